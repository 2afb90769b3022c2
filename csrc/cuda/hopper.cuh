// Host functions for Hopper: tensor maps for the tensor memory accelerator (TMA), and launches in clusters.
//
//   Error encode_2d(map, data, rows, cols, stride, box_rows, box_cols, swizzle)
//     Describes a rows x cols matrix of 16-bit or float elements, row i at data + i * stride, from which TMA copies
//     boxes of box_rows x box_cols. TMA's x counts columns, its y rows. Data and rows must be aligned to 16 bytes, and
//     sizes be at least 1. Boxes are at most 256 x 256; a box's rows are a multiple of 16 bytes, and as wide as the
//     swizzle, if there is one.
//   Error encode_4d(map, data, {cols, rows, m, n}, {row stride, stride of m, stride of n}, box_rows, box_cols, swizzle)
//     Describes a batch of m x n such matrices, such as the heads of a (batch, heads, rows, cols) tensor. A box lies in
//     one of them.
//   Error launch_cluster(kernel, grid, block, cluster, shared, stream, arguments...)
//     Is launch (platform.cuh) with clusters of `cluster` neighbouring blocks. `cluster` must divide `grid`.
//
// Both return null or an error message. tests/emulator/hopper.h implements them for the emulator.
#pragma once
#include "platform.cuh"

#ifdef __CUDACC__
#include <cuda.h>  // for its types; the driver's function is looked up at run time, so nothing is linked

#include <type_traits>

namespace pygpt::cuda {

template <class T, int rank>
Error encode(ptx::TensorMap& map, const T* data, const int64_t (&sizes)[rank], const int64_t (&strides)[rank - 1],
             int box_rows, int box_cols, ptx::Swizzle swizzle) {
  static_assert(sizeof(ptx::TensorMap) == sizeof(CUtensorMap));
  constexpr auto type = std::is_same_v<T, float>  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                        : std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t e =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  if (result != cudaDriverEntryPointSuccess) return "the driver has no cuTensorMapEncodeTiled";

  cuuint64_t size[rank], bytes[rank - 1];
  cuuint32_t box[rank], steps[rank];
  for (int i = 0; i < rank; i++) size[i] = cuuint64_t(sizes[i]), box[i] = steps[i] = 1;
  for (int i = 0; i < rank - 1; i++) bytes[i] = cuuint64_t(strides[i] * sizeof(T));
  box[0] = cuuint32_t(box_cols), box[1] = cuuint32_t(box_rows);
  const CUresult error = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      reinterpret_cast<CUtensorMap*>(&map), type, rank, const_cast<T*>(data), size, bytes, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses these sizes, strides or boxes";
}

template <class... Parameters, class... Arguments>
Error launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster, size_t shared,
                     const Stream& stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster.x, cluster.y, cluster.z};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute, config.numAttrs = 1;
  cudaError_t e = allow_shared(kernel, shared, stream);
  if (e == cudaSuccess) e = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return launch_error(e);
}

}  // namespace pygpt::cuda
#endif

namespace pygpt::cuda {

template <class T>
Error encode_2d(ptx::TensorMap& map, const T* data, int64_t rows, int64_t cols, int64_t stride, int box_rows,
                int box_cols, ptx::Swizzle swizzle) {
  return encode<T, 2>(map, data, {cols, rows}, {stride}, box_rows, box_cols, swizzle);
}

template <class T>
Error encode_4d(ptx::TensorMap& map, const T* data, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                int box_rows, int box_cols, ptx::Swizzle swizzle) {
  return encode<T, 4>(map, data, sizes, strides, box_rows, box_cols, swizzle);
}

}  // namespace pygpt::cuda
