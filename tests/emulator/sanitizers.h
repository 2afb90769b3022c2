// Calls to the sanitizers, which do nothing in a build without them.
//
// The address sanitizer is told of every switch of stacks. The race checker sees each CUDA thread of each block as a
// thread of its own; barriers, __syncwarp and mbarriers order two of them, and nothing else does.
#pragma once
#include <cstddef>

#if defined(PYGPT_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(PYGPT_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif

namespace pygpt::emulator {

#if defined(PYGPT_ADDRESS_SANITIZER)
constexpr bool checks_addresses = true;
inline void leave_stack(void** fake, const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(fake, bottom, size);
}
inline void enter_stack(void* fake, const void** bottom, size_t* size) {
  __sanitizer_finish_switch_fiber(fake, bottom, size);
}
inline void forbid(const void* p, size_t n) { __asan_poison_memory_region(p, n); }
inline void unpoison(const void* p, size_t n) { __asan_unpoison_memory_region(p, n); }
#else
constexpr bool checks_addresses = false;
inline void leave_stack(void**, const void*, size_t) {}
inline void enter_stack(void*, const void**, size_t*) {}
inline void forbid(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
#endif

// The race checker's view of a CUDA thread.
#if defined(PYGPT_THREAD_SANITIZER)
constexpr bool checks_races = true;
inline void* race_context() { return __tsan_create_fiber(0); }
inline void* this_race_context() { return __tsan_get_current_fiber(); }
inline void end_race_context(void* c) { __tsan_destroy_fiber(c); }
inline void switch_race_context(void* c) { __tsan_switch_to_fiber(c, __tsan_switch_to_fiber_no_sync); }
inline void release_races(void* token) { __tsan_release(token); }
inline void acquire_races(void* token) { __tsan_acquire(token); }
#else
constexpr bool checks_races = false;
inline void* race_context() { return nullptr; }
inline void* this_race_context() { return nullptr; }
inline void end_race_context(void*) {}
inline void switch_race_context(void*) {}
inline void release_races(void*) {}
inline void acquire_races(void*) {}
#endif

}  // namespace pygpt::emulator
