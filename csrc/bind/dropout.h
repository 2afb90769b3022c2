// Dropout's arguments, which attention and the norms share.
#pragma once
#include <cmath>

#include "check.h"

namespace pygpt::bind {

// Sets the seed, threshold and keep of Scores or NormArgs, from the op's arguments seed and dropout_p.
template <class Args>
void set_dropout(const Call& call, Args& a, const Maybe& seed, double dropout_p) {
  if (!(dropout_p >= 0 && dropout_p <= 1)) call.fail("dropout_p must be in [0, 1]");
  if (dropout_p > 0 && !seed) call.fail("dropout needs a seed");
  if (!seed) return;
  call.check("seed", *seed, Shape{1}, ScalarType::Long);
  a.seed = static_cast<const int64_t*>(seed->data);
  a.threshold = static_cast<uint64_t>(std::floor(dropout_p * 0x1p32));
  a.keep = dropout_p < 1 ? 1 / (1 - dropout_p) : 0;
}

}  // namespace pygpt::bind
