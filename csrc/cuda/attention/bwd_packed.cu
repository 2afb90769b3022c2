// The gradients of q, k and v of packed calls.
#include "bwd.cuh"

namespace pygpt::cuda {

template Error attention::launch_bwd<attention::Kind::packed>(const Params&, const AttentionArgs&, const Stream&);

}  // namespace pygpt::cuda
