// The Python module pygpt_emulator: the schedule of the next launches, and what was counted.
#include <pybind11/pybind11.h>

#include "runtime.h"

namespace emulator = pygpt::emulator;

namespace {

void schedule(const std::string& name, uint64_t seed) {
  if (name == "fifo") return emulator::set_schedule(emulator::Order::fifo, seed);
  if (name == "reversed") return emulator::set_schedule(emulator::Order::reversed, seed);
  if (name == "random") return emulator::set_schedule(emulator::Order::random, seed);
  throw pybind11::value_error("schedule must be 'fifo', 'reversed' or 'random', got '" + name + "'");
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
  pybind11::list found;
  for (const emulator::Noted& n : emulator::noted()) {
    const dim3 g = n.launch.grid, b = n.launch.block;
    const uint64_t grid = uint64_t{g.x} * g.y * g.z;
    found.append(pybind11::make_tuple(n.offset, b.x * b.y * b.z, n.launch.dynamic_shared, grid));
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(pygpt_emulator, m) {
  m.def("schedule", schedule, pybind11::arg("name"), pybind11::arg("seed") = 0,
        "The order of threads, blocks and asynchronous work from now on: 'fifo', 'reversed' or 'random'.");
  m.def("statistics", statistics, "What was counted since the last reset_statistics().");
  m.def("record", emulator::record, "Whether launches are noted instead of run, from now on.");
  m.def("launches", launches, "Of those noted: the kernel's offset in this file, threads of a block, dynamic shared memory, blocks.");
  m.def("reset_statistics", [] { emulator::statistics = {}; });
}
