// The gradients of q, k and v of calls with softcap, ALiBi, a mask or dropout.
#include "bwd.cuh"

namespace pygpt::cuda {

template Error attention::launch_bwd<attention::Kind::general>(const Params&, const AttentionArgs&, const Stream&);

}  // namespace pygpt::cuda
