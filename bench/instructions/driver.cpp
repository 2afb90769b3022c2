// Calls every CPU kernel at small fixed shapes, on one thread, for callgrind to count: see count.py.
//
// instructions [PART]: the cases whose name contains PART, in turn. Each prints a line, name and work separated by a
// tab, and is one call of counted(). Work is what an ideal kernel would do: multiply-adds of attention, linear and
// mlp, elements of the others. The uncounted call before it leaves scratch memory allocated and symbols resolved.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/cpu/standalone.h"

extern "C" __attribute__((noinline, noclone)) void counted(const std::function<void()>& call) {
  call();
  asm volatile("" : : : "memory");  // so that this is no jump, and the end of the call is the end of counted()
}

using namespace pygpt;
using namespace pygpt::cpu::PYGPT_ISA;

namespace {

// Storage types: which bits of a number are its mantissa, and where its exponent is 0.
struct Format {
  const char* name;
  int bytes, mantissa, bias;
};
Format format(DType dtype) {
  switch (dtype) {
    case DType::f32: return {"f32", 4, 23, 127};
    case DType::bf16: return {"bf16", 2, 7, 127};
    default: return {"f16", 2, 10, 15};
  }
}

// One case's arrays, filled with the same numbers in every run: 1/16 to 1, of either sign.
struct Arrays {
  DType dtype;
  std::vector<std::unique_ptr<void, decltype(&std::free)>> owned = {};
  uint64_t state = 1;

  template <class Bits>
  void fill(Bits* data, int64_t n, Format f) {
    for (int64_t i = 0; i < n; i++) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const uint64_t mantissa = state >> (64 - f.mantissa), exponent = uint64_t(f.bias) - 1 - (state >> 8 & 3);
      data[i] = Bits((state >> 16 & 1) << (8 * f.bytes - 1) | exponent << f.mantissa | mantissa);
    }
  }
  void* array(DType type, int64_t n) {
    const Format f = format(type);
    void* data = std::aligned_alloc(64, size_t(n * f.bytes + 63) / 64 * 64);
    owned.emplace_back(data, &std::free);
    f.bytes == 4 ? fill(static_cast<uint32_t*>(data), n, f) : fill(static_cast<uint16_t*>(data), n, f);
    return data;
  }
  void* operator()(int64_t n) { return array(dtype, n); }
  void* statistics(int64_t n) { return array(DType::f32, n); }
  Rows rows(int64_t n, int64_t cols) { return {(*this)(n * cols), cols}; }
  Heads heads(int64_t heads, int64_t length, int64_t channels) {  // as the GPT's projection leaves them
    return {(*this)(length * heads * channels), {length * heads * channels, channels, heads * channels, 1}};
  }
};

std::string part;

template <class... Part>
std::string text(const Part&... parts) {
  std::ostringstream s;
  (s << ... << parts);
  return s.str();
}

template <class Args>
void count(const std::string& name, int64_t work, void (*kernel)(const Args&), const Args& a) {
  if (name.find(part) == std::string::npos) return;
  kernel(a);
  std::cout << name << '\t' << work << '\n';
  counted([&] { kernel(a); });
}

void attention(DType dtype, int64_t H, int64_t L, int64_t S, int64_t E, int64_t Ev, bool causal) {
  Arrays make = {dtype};
  AttentionArgs a = {};
  a.dtype = dtype, a.batch = 1, a.heads = a.kv_heads = H, a.sequences.q_len = L, a.sequences.k_len = S, a.head_dim = E,
  a.v_dim = Ev;
  a.reach.right = causal ? 0 : -1, a.scores.scale = 0.125, a.lse_stride[0] = H * L, a.lse_stride[1] = L;
  a.q = make.heads(H, L, E), a.k = make.heads(H, S, E), a.v = make.heads(H, S, Ev);
  a.out = make.heads(H, L, Ev), a.lse = make.statistics(H * L), a.dout = make.heads(H, L, Ev);
  a.dq = make.heads(H, L, E), a.dk = make.heads(H, S, E), a.dv = make.heads(H, S, Ev);
  const int64_t pairs = H * (causal ? L * (L + 1) / 2 : L * S);
  const auto shape =
      text(' ', format(dtype).name, " H", H, " L", L, " S", S, " E", E, " Ev", Ev, causal ? " causal" : "");
  count("attention_fwd" + shape, pairs * (E + Ev), attention_fwd, a);
  count("attention_bwd" + shape, pairs * (3 * E + 2 * Ev), attention_bwd, a);
}

// Causal sequences that begin at these rows.
void varlen_attn(DType dtype, int64_t H, const std::vector<int32_t>& starts, int64_t E) {
  Arrays make = {dtype};
  AttentionArgs a = {};
  const int64_t rows = starts.back();
  int64_t pairs = 0;
  a.dtype = dtype, a.batch = starts.size() - 1, a.heads = a.kv_heads = H, a.head_dim = a.v_dim = E;
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t length = starts[b + 1] - starts[b];
    a.sequences.q_len = a.sequences.k_len = std::max(a.sequences.q_len, length);
    pairs += H * length * (length + 1) / 2;
  }
  a.sequences.cu_seq_q = a.sequences.cu_seq_k = starts.data(), a.sequences.total_q = a.sequences.total_k = rows;
  a.reach = {-1, 0, true}, a.scores.scale = 0.125, a.lse_stride[1] = rows, a.lse = make.statistics(H * rows);
  for (Heads* t : {&a.q, &a.k, &a.v, &a.out, &a.dout, &a.dq, &a.dk, &a.dv})
    *t = make.heads(H, rows, E), t->stride[0] = 0;
  const auto shape = text(' ', format(dtype).name, " H", H, " N", a.batch, " rows", rows, " E", E);
  count("varlen_attn_fwd" + shape, pairs * 2 * E, attention_fwd, a);
  count("varlen_attn_bwd" + shape, pairs * 5 * E, attention_bwd, a);
}

void linear(DType dtype, int64_t M, int64_t K, int64_t N) {
  Arrays make = {dtype};
  LinearArgs a = {};
  a.dtype = dtype, a.rows = M, a.in = K, a.out = N;
  a.x = make.rows(M, K), a.weight = make.rows(N, K), a.bias = make(N), a.y = make.rows(M, N), a.dy = make.rows(M, N);
  a.dx = make(M * K), a.dw = make(N * K), a.db = make(N);
  const auto shape = text(' ', format(dtype).name, " M", M, " K", K, " N", N);
  count("linear_fwd" + shape, M * K * N, linear_fwd, a);
  count("linear_bwd" + shape, 2 * M * K * N, linear_bwd, a);
}

void mlp(DType dtype, Activation activation, bool gated, const char* called, int64_t M, int64_t C, int64_t H) {
  Arrays make = {dtype};
  MlpArgs a = {};
  a.dtype = dtype, a.activation = activation, a.gated = gated;
  a.rows = M, a.in = C, a.hidden_dim = H, a.out = C;
  const int64_t F = a.fc_dim();
  a.x = make.rows(M, C), a.fc_weight = make.rows(F, C), a.fc_bias = make(F), a.hidden = make(M * H);
  a.pre = saves_input(activation) ? make(M * F) : nullptr;
  a.proj_weight = make.rows(C, H), a.proj_bias = make(C), a.y = make(M * C);
  a.dy = make.rows(M, C), a.dpre = make(M * F), a.dx = make(M * C);
  a.dfc_weight = make(F * C), a.dfc_bias = make(F), a.dproj_weight = make(C * H), a.dproj_bias = make(C);
  const auto shape = text(' ', format(dtype).name, ' ', called, " M", M, " C", C, " H", H);
  count("mlp_fwd" + shape, M * C * (F + H), mlp_fwd, a);
  count("mlp_bwd" + shape, 2 * M * C * (F + H), mlp_bwd, a);
}

enum class Norm { layer_norm, add_layer_norm, rms_norm };

void norm(DType dtype, Norm kind, const char* called, int64_t M, int64_t N) {
  Arrays make = {dtype};
  NormArgs a = {};
  a.dtype = a.sum_dtype = a.parameter_dtype = dtype, a.rows = M, a.cols = N, a.eps = 1e-5;
  a.x = make.rows(M, N), a.weight = make(N), a.y = make(M * N), a.rstd = make.statistics(M);
  a.dy = make.rows(M, N), a.dx = make(M * N), a.dw = make(N);
  if (kind == Norm::add_layer_norm) a.residual = make.rows(M, N), a.sum = make(M * N), a.dsum = make.rows(M, N);
  if (kind != Norm::rms_norm) a.bias = make(N), a.mean = make.statistics(M), a.db = make(N);
  const auto shape = text(' ', format(dtype).name, " M", M, " N", N);
  count(text(called, "_fwd", shape), M * N, norm_fwd, a);
  count(text(called, "_bwd", shape), M * N, norm_bwd, a);
}

void rope(DType dtype, const char* kind, int64_t H, int64_t L, int64_t D) {
  Arrays make = {dtype};
  RopeArgs a = {};
  a.dtype = dtype, a.batch = 1, a.length = a.table_rows = L, a.head_dim = D, a.half = D / 2, a.eps = 1e-6;
  a.cos = make.statistics(L * D / 2), a.sin = make.statistics(L * D / 2);
  const std::string_view name = kind;
  a.interleaved = name.find("interleaved") != name.npos;
  for (RopeSide& side : a.sides) {
    side.heads = H, side.x = make.heads(H, L, D), side.y = make.heads(H, L, D);
    side.dy = make.heads(H, L, D), side.dx = make.heads(H, L, D);
    if (name.find("norm") != name.npos)
      side.weight = make.statistics(D), side.rstd = make.statistics(H * L), side.dweight = make.statistics(D);
  }
  const auto shape = text(' ', format(dtype).name, kind, " H", H, " L", L, " D", D);
  count("rope_fwd" + shape, 2 * H * L * D, rope_fwd, a);
  count("rope_bwd" + shape, 2 * H * L * D, rope_bwd, a);
}

void activation(DType dtype, Activation which, const char* called, int64_t n) {
  Arrays make = {dtype};
  ActivationArgs a = {};
  a.dtype = dtype, a.activation = which, a.n = n, a.x = make(n), a.y = make(n), a.dy = make(n), a.dx = make(n);
  const auto shape = text(' ', format(dtype).name, " M", n);
  count(text(called, "_fwd", shape), n, activation_fwd, a);
  count(text(called, "_bwd", shape), n, activation_bwd, a);
}

// The mean loss of N rows of V classes, whose targets are the classes in turn.
CrossEntropyArgs loss(Arrays& make, std::vector<int64_t>& target, int64_t N, int64_t V, double smoothing) {
  CrossEntropyArgs a = {};
  for (int64_t i = 0; i < N; i++) target.push_back(i % V);
  a.dtype = make.dtype, a.rows = N, a.classes = V, a.target = target.data(), a.ignore_index = -100;
  a.reduction = Reduction::mean, a.label_smoothing = smoothing, a.loss = make.statistics(1);
  a.stats = make.statistics(2 * N), a.totals = make.statistics(2), a.dloss = make.statistics(1);
  return a;
}

void cross_entropy(DType dtype, int64_t N, int64_t V, double smoothing) {
  Arrays make = {dtype};
  std::vector<int64_t> target;
  CrossEntropyArgs a = loss(make, target, N, V, smoothing);
  a.x = make.rows(N, V), a.dx = make.rows(N, V);
  const auto shape = text(' ', format(dtype).name, smoothing > 0 ? " smoothed" : "", " N", N, " V", V);
  count("cross_entropy_fwd" + shape, N * V, cross_entropy_fwd, a);
  count("cross_entropy_bwd" + shape, N * V, cross_entropy_bwd, a);
}

void linear_cross_entropy(DType dtype, int64_t N, int64_t K, int64_t V) {
  Arrays make = {dtype};
  std::vector<int64_t> target;
  LinearCrossEntropyArgs a = {};
  a.loss = loss(make, target, N, V, 0), a.in = K, a.chunk = N / 2, a.x = make.rows(N, K);
  a.linear_weight = make.rows(V, K), a.logits = make.statistics(N / 2 * V);
  a.dx = make.statistics(N * K), a.dw = make.statistics(V * K);
  const auto shape = text(' ', format(dtype).name, " N", N, " K", K, " V", V);
  count("linear_cross_entropy_fwd" + shape, 3 * N * K * V, linear_cross_entropy_fwd, a);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) part = argv[1];
  const DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
  for (DType d : {f32, bf16}) {
    attention(d, 1, 200, 200, 64, 64, true);
    attention(d, 2, 1, 256, 64, 64, false);  // decoding
    linear(d, 64, 400, 96);
    linear(d, 4, 256, 128);  // decoding
    mlp(d, Activation::gelu_tanh, false, "gelu_tanh", 48, 64, 256);
    mlp(d, Activation::gelu, false, "gelu", 4, 64, 256);
    mlp(d, Activation::silu, true, "swiglu", 48, 64, 160);
    norm(d, Norm::layer_norm, "layer_norm", 128, 256);
    norm(d, Norm::add_layer_norm, "add_layer_norm", 128, 256);
    norm(d, Norm::rms_norm, "rms_norm", 128, 256);
    for (const char* kind : {"", " norm", " interleaved"}) rope(d, kind, 4, 16, 64);
    activation(d, Activation::gelu, "gelu", 10000);
    activation(d, Activation::gelu_tanh, "gelu_tanh", 10000);
    activation(d, Activation::relu, "relu", 10000);
    activation(d, Activation::relu2, "relu2", 10000);
    cross_entropy(d, 4, 5000, 0);
    cross_entropy(d, 4, 5000, 0.1);
    linear_cross_entropy(d, 64, 64, 300);
  }
  // What float16 converts, and sizes that are a multiple of nothing.
  linear(f16, 64, 400, 96);
  activation(f16, Activation::gelu, "gelu", 10000);
  attention(f32, 2, 77, 101, 41, 27, false);
  varlen_attn(f32, 1, {0, 100, 103, 200, 260}, 64);
  linear(f32, 33, 61, 45);
  linear(f32, 37, 256, 272);  // some rows of a W worth leaving unpacked
  mlp(f32, Activation::relu, false, "relu", 31, 45, 83);
  norm(f32, Norm::layer_norm, "layer_norm", 50, 101);
  cross_entropy(f32, 50, 101, 0);
}
