// The forward pass of packed calls.
#include "fwd.cuh"

namespace pygpt::cuda {

template Error attention::launch_fwd<attention::Kind::packed>(const AttentionArgs&, const Stream&);

}  // namespace pygpt::cuda
