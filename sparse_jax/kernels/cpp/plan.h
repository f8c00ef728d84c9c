// The nonzeros of one pass, in the order in which they are used.
#pragma once

#include "tiles.h"

namespace sparse_jax {

// A pattern's list of units of block_rows inputs by block_columns outputs at each tap: of each of the units' outputs (transposed: inputs)
// the units as input (transposed: output) * taps + tap, in ascending order.
struct List {
  const int32_t *index, *pointer;
  int64_t inputs, outputs, block_rows, block_columns;
  bool transposed;
};

// One nonzero: where its operands start in the packed window, in vectors, and its value or its place in the dense kernel.
struct Entry {
  int32_t offset;
  union {
    float value;
    int32_t index;
  };
};

// Entries by block of source channels, then by destination channel, then by source channel.
struct Plan {
  int64_t block, blocks, rows;
  std::vector<int64_t> start;  // [blocks * rows + 1]
  Entry* entries;

  const Entry* begin(int64_t b, int64_t r) const { return entries + start[b * rows + r]; }
  const Entry* end(int64_t b, int64_t r) const { return entries + start[b * rows + r + 1]; }
};

// Source channels a block. A small one keeps its packed window in the first cache, where an operand costs half of what it costs in
// the second (measured: 195 against 104 GFLOP/s a core); but in each block an output's kTile sums are read and written again, which
// costs as much as four nonzeros. So: small where outputs have more than a few nonzeros in a block, else half of the second cache.
inline int64_t block_channels(const Pass& pass, int64_t channels, double nonzeros_per_channel) {
  const double bytes = double(pass.positions()) * sizeof(Vector);
  const int64_t small = std::max<int64_t>(kLanes, int64_t(40e3 / bytes) / kLanes * kLanes);
  const int64_t large = std::max<int64_t>(kLanes, int64_t(512e3 / bytes) / kLanes * kLanes);
  const double cost_small = 1 + 4 / (nonzeros_per_channel * small), cost_large = 1.9 + 4 / (nonzeros_per_channel * large);
  return std::min(channels, cost_small < cost_large ? small : large);
}

// What a (source channel, tap) means in one pass, looked up instead of divided for.
struct Operand {
  int32_t block, offset;  // offset -1: the tap is not in this pass
  int64_t place;          // in the dense kernel, without the destination channel's part
};

// Calls visit(operand) for each nonzero of destination channel r.
template <typename F>
inline void for_nonzeros(const List& list, const std::vector<Operand>& operands, int64_t taps, int64_t r, F visit) {
  const int64_t size = list.transposed ? list.block_columns : list.block_rows;
  const int64_t unit = r / (list.transposed ? list.block_rows : list.block_columns);
  const int32_t *k = list.index + list.pointer[unit], *end = list.index + list.pointer[unit + 1];
  if (size == 1) {
    for (; k != end; k++) visit(operands[*k]);
    return;
  }
  const int64_t sources = int64_t(operands.size()) / taps;
  for (; k != end; k++) {
    const int64_t first = *k / taps * size, tap = *k % taps;
    for (int64_t s = first; s < std::min(first + size, sources); s++) visit(operands[s * taps + tap]);
  }
}

// values: the dense kernel; null where entries shall hold places instead.
inline Plan make_plan(ffi::ThreadPool& pool, const List& list, const Pass& pass, const Geometry& g, const float* values, Lease& scratch) {
  Plan plan;
  plan.rows = list.transposed ? list.inputs : list.outputs;
  const int64_t sources = list.transposed ? list.outputs : list.inputs, positions = pass.positions();
  const int64_t unit = list.transposed ? list.block_rows : list.block_columns;
  const double nonzeros = double(list.pointer[(plan.rows + unit - 1) / unit]) * double(list.block_rows * list.block_columns);
  plan.block = block_channels(pass, sources, nonzeros / (double(plan.rows) * double(sources)));
  plan.blocks = (sources + plan.block - 1) / plan.block;
  plan.start.assign(plan.blocks * plan.rows + 1, 0);

  const int64_t taps = g.taps_y * g.taps_x;
  std::vector<Operand> operands(sources * taps);
  for (int64_t t = 0; t < taps; t++) {
    const int64_t y = pass.y.tap[t / g.taps_x], x = pass.x.tap[t % g.taps_x];
    const int64_t offset = (y * pass.window_columns + x) * pass.groups;
    for (int64_t source = 0; source < sources; source++) {
      Operand& operand = operands[source * taps + t];
      operand.block = int32_t(source / plan.block);
      operand.offset = y < 0 || x < 0 ? -1 : int32_t(source % plan.block * positions + offset);
      operand.place = list.transposed ? t * list.inputs * list.outputs + source : (t * list.inputs + source) * list.outputs;
    }
  }
  // Rows in chunks: neighbouring outputs share cache lines of the dense kernel, from which the values are gathered.
  const int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(16, plan.rows / 16)), chunks = (plan.rows + chunk - 1) / chunk;
  auto for_rows = [&](auto work) {
    parallel_for(pool, chunks, [&](int64_t part) {
      for (int64_t r = part * chunk; r < std::min(plan.rows, (part + 1) * chunk); r++) work(r);
    });
  };
  for_rows([&](int64_t r) {
    for_nonzeros(list, operands, taps, r, [&](const Operand& operand) {
      if (operand.offset >= 0) plan.start[operand.block * plan.rows + r + 1]++;
    });
  });
  for (int64_t i = 0; i < plan.blocks * plan.rows; i++) plan.start[i + 1] += plan.start[i];
  plan.entries = scratch.get<Entry>(plan.start.back() + 1);
  static thread_local Scratch cursor_scratch;
  for_rows([&](int64_t r) {
    int64_t* cursor = cursor_scratch.get<int64_t>(plan.blocks);
    for (int64_t b = 0; b < plan.blocks; b++) cursor[b] = plan.start[b * plan.rows + r];
    const int64_t own = list.transposed ? r * list.outputs : r;
    for_nonzeros(list, operands, taps, r, [&](const Operand& operand) {
      if (operand.offset < 0) return;
      Entry& entry = plan.entries[cursor[operand.block]++];
      entry.offset = operand.offset;
      if (values)
        entry.value = values[operand.place + own];
      else
        entry.index = int32_t(operand.place + own);
    });
  });
  return plan;
}

}  // namespace sparse_jax
