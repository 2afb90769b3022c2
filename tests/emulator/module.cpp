// The Python module pygpt_emulator: sets the schedule, reads statistics and recorded launches.
#include <pybind11/pybind11.h>

#include "runtime.h"

namespace emulator = pygpt::emulator;

namespace {

void schedule(const std::string& name, uint64_t seed) {
  if (name == "fifo") return emulator::set_schedule(emulator::Order::fifo, seed);
  if (name == "reversed") return emulator::set_schedule(emulator::Order::reversed, seed);
  if (name == "random") return emulator::set_schedule(emulator::Order::random, seed);
  if (name == "ahead") return emulator::set_schedule(emulator::Order::ahead, seed);
  throw pybind11::value_error("schedule must be 'fifo', 'reversed', 'random' or 'ahead', got '" + name + "'");
}

pybind11::dict statistics() {
  const emulator::Statistics& s = emulator::statistics;
  pybind11::dict d;
  d["launches"] = s.launches, d["blocks"] = s.blocks, d["threads"] = s.threads, d["switches"] = s.switches;
  d["barriers"] = s.barriers, d["collectives"] = s.collectives, d["async_copies"] = s.async_copies, d["mma"] = s.mma;
  d["ldmatrix_phases"] = s.ldmatrix_phases, d["ldmatrix_cycles"] = s.ldmatrix_cycles;
  d["tma"] = s.tma, d["wgmma"] = s.wgmma;
  return d;
}

pybind11::list launches() {
  pybind11::list list;
  for (const emulator::RecordedLaunch& r : emulator::recorded_launches()) {
    const dim3 g = r.launch.grid, b = r.launch.block;
    const uint64_t blocks = uint64_t{g.x} * g.y * g.z;
    list.append(pybind11::make_tuple(r.offset, b.x * b.y * b.z, r.launch.dynamic_shared, blocks));
  }
  return list;
}

}  // namespace

PYBIND11_MODULE(pygpt_emulator, m) {
  m.def("schedule", schedule, pybind11::arg("name"), pybind11::arg("seed") = 0,
        "Sets the order of threads, blocks and asynchronous work for later launches: 'fifo', 'reversed', 'random' or "
        "'ahead', under which the running warp goes on for as long as it can.");
  m.def("statistics", statistics, "The events counted since the last reset_statistics().");
  m.def("record", emulator::record, "Later launches are recorded and do not run (True), or run again (False).");
  m.def("launches", launches,
        "The recorded launches: (kernel's offset in this file, threads per block, dynamic shared memory, blocks).");
  m.def("reset_statistics", [] { emulator::statistics = {}; });
}
