// The forward pass of dense calls that scale their scores and do nothing else to them, and the entry point of all.
#include "fwd.cuh"

namespace pygpt::cuda {
namespace attention {
extern template Error launch_fwd<Kind::packed>(const AttentionArgs&, const Stream&);   // fwd_packed.cu
extern template Error launch_fwd<Kind::general>(const AttentionArgs&, const Stream&);  // fwd_general.cu
}  // namespace attention

Error attention_fwd(const AttentionArgs& a, const Stream& stream) {
  using namespace attention;
  if (const Error e = objection(a)) return e;
  return by_kind(a, [&](auto kind) { return launch_fwd<kind>(a, stream); });
}

}  // namespace pygpt::cuda
