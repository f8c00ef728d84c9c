// The nonzeros of one pass, in the order in which they are used.
#pragma once

#include <stdexcept>
#include <string>

#include "tiles.h"

namespace sparse_jax {

// A pattern's list of units of block_rows inputs by block_columns outputs at each tap: of each of the units' inputs the units as
// output * taps + tap, in ascending order. That is nearly the order in which the dense kernel lies in memory, from which values are read.
struct List {
  const int32_t *index, *pointer;
  int64_t indices, pointers;  // their lengths
  int64_t inputs, outputs, block_rows, block_columns;
  bool transposed;  // whether inputs are the destination
  bool compact;     // whether the kernel is its listed units only, [units][block_rows][block_columns], in the order of the list

  bool dense() const { return pointers == 0; }
  int64_t rows() const { return (inputs + block_rows - 1) / block_rows; }
};

// A list that does not belong to the kernel would have the loops below write beyond their arrays.
inline void check(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("sparse_jax: the pattern does not belong to this weight: ") + what);
}

// One nonzero: where its operands start in the packed window, in vectors, and its value or its place in the kernel.
struct Entry {
  int32_t offset;
  union {
    float value;
    int32_t index;
  };
};

// A range of entries as the inner loops walk it: the k-th from here on.
struct Entries {
  const Entry* at;

  int32_t offset(int64_t k) const { return at[k].offset; }
  float value(int64_t k) const { return at[k].value; }
  int64_t operator-(Entries other) const { return at - other.at; }
  void operator+=(int64_t k) { at += k; }
};

// Entries by block of source channels, then by destination channel, then by source channel.
struct Plan {
  int64_t block, blocks, rows;
  std::vector<int64_t> start;  // [blocks * rows + 1]
  Entry* entries;

  const Entry* begin(int64_t b, int64_t r) const { return entries + start[b * rows + r]; }
  const Entry* end(int64_t b, int64_t r) const { return entries + start[b * rows + r + 1]; }
};

// Work in pieces: parts of the tiles times ranges of destination channels. Where there are fewer tiles than keep all threads busy,
// channels are divided too, and each range packs the window again. No sum reaches over channels, so this changes no bit.
struct Pieces {
  int64_t tiles, parts, ranges, width, rows;

  // shares: ranges a thread, where it is quickly done: one that wakes up late then has less to catch up.
  Pieces(const Threads& pool, int64_t tiles, int64_t parts, int64_t rows, int64_t shares = 1) : tiles(tiles), parts(parts), rows(rows) {
    const int64_t wanted = parts == 0 || parts >= 2 * pool.num_threads() ? 1 : (shares * pool.num_threads() + parts - 1) / parts;
    width = std::max<int64_t>(2 * kLanes, (rows + wanted * kLanes - 1) / (wanted * kLanes) * kLanes);
    ranges = (rows + width - 1) / width;
  }
  int64_t count() const { return parts * ranges; }
  int64_t part(int64_t i) const { return i / ranges; }
  int64_t first_tile(int64_t i) const { return tiles * part(i) / parts; }
  int64_t last_tile(int64_t i) const { return tiles * (part(i) + 1) / parts; }
  int64_t first(int64_t i) const { return i % ranges * width; }
  int64_t last(int64_t i) const { return std::min(rows, first(i) + width); }
};

// Source channels a block. A small one keeps its packed window in the first cache, where an operand costs half of what it costs in
// the second (measured: 195 against 104 GFLOP/s a core); but in each block an output's kTile sums are read and written again, which
// costs as much as four nonzeros. So: small where outputs have more than a few nonzeros in a block, else half of the second cache. Of a small
// tile an operand is a vector or a few, and costs what stands around it: then blocks gain nothing.
inline int64_t block_channels(const Pass& pass, int64_t channels, double nonzeros_per_channel) {
  const double bytes = double(pass.positions()) * sizeof(Vector);
  const int64_t small = std::max<int64_t>(kLanes, int64_t(40e3 / bytes) / kLanes * kLanes);
  const int64_t large = std::max<int64_t>(kLanes, int64_t(512e3 / bytes) / kLanes * kLanes);
  const double cost_small = 1 + 4 / (nonzeros_per_channel * small), cost_large = 1.9 + 4 / (nonzeros_per_channel * large);
  return std::min(channels, cost_small < cost_large && pass.vectors == kTile ? small : large);
}

// What an (output channel, tap) means in one pass, looked up instead of divided for.
struct Operand {
  int32_t target;  // its row; where inputs are rows: its block
  int32_t offset;  // in the packed window, but for the input channel's part; kNoTap: the tap is not in this pass
  int64_t place;   // in the dense kernel, but for the input channel's part
};
inline constexpr int32_t kNoTap = INT32_MIN;

// Calls visit(operand, place) for each nonzero of an input channel; its place is where the kernel holds its value. CHECKED: the first time
// that the list is read.
template <bool CHECKED, typename F>
inline void for_nonzeros(const List& list, const Operand* operands, int64_t taps, int64_t input, F visit) {
  const int64_t unit = input / list.block_rows, size = list.block_columns;
  const int64_t from = list.pointer[unit], to = list.pointer[unit + 1];
  if (CHECKED) check(0 <= from && from <= to && to <= list.indices, "its pointers leave its indices");
  const uint32_t places = uint32_t((list.outputs + size - 1) / size * taps);
  const int64_t area = list.block_rows * size, row = input % list.block_rows * size, column = input * list.outputs;
  for (int64_t i = from; i < to; i++) {
    const int64_t k = list.index[i];
    if (CHECKED && uint32_t(k) >= places) check(false, "an index lies beyond its outputs and taps");
    if (size == 1) {
      const Operand& operand = operands[k];
      if (operand.offset != kNoTap) visit(operand, list.compact ? i * area + row : operand.place + column);
      continue;
    }
    const int64_t first = k / taps * size, tap = k % taps;
    for (int64_t o = first; o < std::min(first + size, list.outputs); o++) {
      const Operand& operand = operands[o * taps + tap];
      if (operand.offset != kNoTap) visit(operand, list.compact ? i * area + row + o - first : operand.place + column);
    }
  }
}

// values: the kernel; null where entries shall hold places instead.
inline Plan make_plan(const Threads& pool, const List& list, const Pass& pass, const Geometry& g, const float* values, Lease& scratch) {
  Plan plan;
  plan.rows = list.transposed ? list.inputs : list.outputs;
  const int64_t sources = list.transposed ? list.outputs : list.inputs, positions = pass.positions();
  check(list.pointers > list.rows(), "it has too few pointers for its inputs");
  const double nonzeros = double(list.pointer[list.rows()]) * double(list.block_rows * list.block_columns);
  plan.block = block_channels(pass, sources, nonzeros / (double(plan.rows) * double(sources)));
  if (positions >= INT32_MAX / plan.block) throw std::bad_alloc();  // offsets in the window are int32
  plan.blocks = (sources + plan.block - 1) / plan.block;
  plan.start.assign(plan.blocks * plan.rows + 1, 0);

  static thread_local Scratch operand_scratch, cursor_scratch;
  const int64_t taps = g.taps_y * g.taps_x;
  Operand* operands = operand_scratch.get<Operand>(list.outputs * taps);
  for (int64_t t = 0; t < taps; t++) {
    const int64_t y = pass.y.tap[t / g.taps_x], x = pass.x.tap[t % g.taps_x];
    const int32_t offset = int32_t((y * pass.window_columns + x) * pass.groups);
    for (int64_t o = 0, b = 0, c = 0; o < list.outputs; o++, c++) {
      if (c == plan.block) c = 0, b++;
      Operand& operand = operands[o * taps + t];
      operand.target = int32_t(list.transposed ? b : o);
      operand.offset = y < 0 || x < 0 ? kNoTap : list.transposed ? int32_t(c * positions) + offset : offset;
      operand.place = t * list.inputs * list.outputs + o;
    }
  }
  // Inputs in chunks, each of which fills in lists of its own: a block, where they are sources; some neighbouring rows otherwise.
  const int64_t chunk = list.transposed ? std::max<int64_t>(1, std::min<int64_t>(16, plan.rows / 16)) : plan.block;
  const int64_t chunks = (list.inputs + chunk - 1) / chunk;
  auto slot = [&](int64_t input, int64_t part, int32_t target) {
    return list.transposed ? target * plan.rows + input : part * plan.rows + target;
  };
  parallel_for(pool, chunks, [&](int64_t part) {
    for (int64_t input = part * chunk; input < std::min(list.inputs, (part + 1) * chunk); input++)
      for_nonzeros<true>(list, operands, taps, input, [&](const Operand& operand, int64_t) { plan.start[slot(input, part, operand.target) + 1]++; });
  });
  for (int64_t i = 0; i < plan.blocks * plan.rows; i++) plan.start[i + 1] += plan.start[i];
  plan.entries = scratch.get<Entry>(plan.start.back() + 1);
  parallel_for(pool, chunks, [&](int64_t part) {
    const int64_t targets = list.transposed ? plan.blocks : plan.rows;
    int64_t* cursor = cursor_scratch.get<int64_t>(targets);
    for (int64_t input = part * chunk; input < std::min(list.inputs, (part + 1) * chunk); input++) {
      if (list.transposed || input == part * chunk)
        for (int64_t i = 0; i < targets; i++) cursor[i] = plan.start[slot(input, part, int32_t(i))];
      const int32_t offset = list.transposed ? 0 : int32_t((input - part * chunk) * positions);
      for_nonzeros<false>(list, operands, taps, input, [&](const Operand& operand, int64_t place) {
        Entry& entry = plan.entries[cursor[operand.target]++];
        entry.offset = operand.offset + offset;
        if (values)
          entry.value = values[place];
        else
          entry.index = int32_t(place);
      });
    }
  });
  return plan;
}

}  // namespace sparse_jax
