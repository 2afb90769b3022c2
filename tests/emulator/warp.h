// Shuffles, votes and __syncwarp (warp.cpp).
#pragma once
#include "runtime.h"

namespace pygpt::emulator {

void syncwarp(uint32_t mask, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);

// A lane that reads outside its group of `width` lanes gets its own value, as on hardware.
enum class Shuffle { from, up, down, exclusive_or };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int operand, int width, Site site);

}  // namespace pygpt::emulator
