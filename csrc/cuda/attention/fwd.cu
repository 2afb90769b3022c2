// The forward pass of calls that scale their scores and do nothing else to them, and the entry point of all.
#include "fwd.cuh"

namespace pygpt::cuda {

extern template Error attention::launch_fwd<true>(const AttentionArgs&, const Stream&);  // fwd_general.cu

Error attention_fwd(const AttentionArgs& a, const Stream& stream) {
  using namespace attention;
  if (const Error e = objection(a)) return e;
  return a.scores.scale_only() ? launch_fwd<false>(a, stream) : launch_fwd<true>(a, stream);
}

}  // namespace pygpt::cuda
