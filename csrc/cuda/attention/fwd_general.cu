// The forward pass of calls with softcap, ALiBi, a mask or dropout.
#include "fwd.cuh"

namespace pygpt::cuda {

template Error attention::launch_fwd<attention::Kind::general>(const AttentionArgs&, const Stream&);

}  // namespace pygpt::cuda
