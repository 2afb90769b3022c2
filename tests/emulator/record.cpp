// While recording, launches are listed and do not run.
#include <dlfcn.h>

#include "runtime.h"

namespace pygpt::emulator {
namespace {
bool recording = false;
std::vector<RecordedLaunch> launches;
}  // namespace

void record(bool on) {
  recording = on;
  if (on) launches.clear();
}

const std::vector<RecordedLaunch>& recorded_launches() { return launches; }

bool record_launch(const void* kernel, const Launch& launch) {
  if (!recording) return false;
  Dl_info library{};
  dladdr(kernel, &library);
  launches.push_back({size_t(static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase)), launch});
  return true;
}

}  // namespace pygpt::emulator
