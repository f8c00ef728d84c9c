// A kernel that never changes: its values lie in the order of use, so that nothing is read from a dense array.
#pragma once

#include <cmath>

#include "plan.h"

namespace sparse_jax {

// A list of units by output, as input * taps + tap in ascending order, and their values [units][block_rows][block_columns].
struct FrozenList {
  const int32_t *index, *pointer;
  const float* values;
  int64_t indices, pointers;  // their lengths
  int64_t inputs, outputs, block_rows, block_columns;

  int64_t rows() const { return (outputs + block_columns - 1) / block_columns; }
};

// Single weights: the table says where an index lies in the packed window.
struct Singles {
  const int32_t* index;
  const float* values;
  const int32_t* table;
  uint32_t mask;  // keeps what is no index of this kernel inside the table

  int32_t offset(int64_t k) const { return table[uint32_t(index[k]) & mask]; }
  float value(int64_t k) const { return values[k]; }
  int64_t operator-(const Singles& other) const { return index - other.index; }
  void operator+=(int64_t k) { index += k, values += k; }
};

// One output's weights of one block: neighbouring inputs.
struct Run {
  int64_t at;
  const float* values;
  int32_t first, positions;
  int64_t columns;

  int32_t offset(int64_t k) const { return first + int32_t(at + k) * positions; }
  float value(int64_t k) const { return values[(at + k) * columns]; }
  int64_t operator-(const Run& other) const { return at - other.at; }
  void operator+=(int64_t k) { at += k; }
};

struct FrozenPlan {
  FrozenList list;
  int64_t taps, block, blocks, positions, block_rows, block_columns;
  std::vector<int64_t> start;   // [blocks + 1][rows of units]
  std::vector<int32_t> table;   // of each index, where it starts in its block's window; up to a power of two
  uint32_t mask;

  Singles at(int64_t k) const { return {list.index + k, list.values + k, table.data(), mask}; }
  Singles begin(int64_t b, int64_t r) const { return at(start[b * list.rows() + r]); }
  Singles end(int64_t b, int64_t r) const { return at(start[(b + 1) * list.rows() + r]); }

  // Calls visit(begin, end) for the part of each block that is an output's.
  template <typename F>
  void for_units(int64_t b, int64_t output, F visit) const {
    const int64_t r = output / block_columns, column = output % block_columns;
    for (int64_t k = start[b * list.rows() + r]; k < start[(b + 1) * list.rows() + r]; k++) {
      const uint32_t index = uint32_t(list.index[k]) & mask;
      if (table[index] == block * positions) continue;  // a tap that meets no image
      const int64_t length = std::min(block_rows, list.inputs - int64_t(index) / taps * block_rows);
      const float* values = list.values + k * block_rows * block_columns + column;
      const int32_t offset = table[index], step = int32_t(positions);
      visit(Run{0, values, offset, step, block_columns}, Run{std::max<int64_t>(0, length), values, offset, step, block_columns});
    }
  }
};

// Where an output's units begin and end; checked.
struct Ends {
  int64_t from, to;

  Ends(const FrozenList& list, int64_t row) : from(list.pointer[row]), to(list.pointer[row + 1]) {
    check(0 <= from && from <= to && to <= list.indices, "its pointers leave its indices");
  }
};

inline constexpr int64_t kFewVectors = 2;

// A few vectors times a matrix of single weights. An operand is one number: no tile is packed, and x stays in the first cache.
inline void times_vectors(const Threads& pool, const FrozenList& list, const float* x, int64_t count, float* y) {
  const int64_t outputs = list.outputs, ranges = std::min<int64_t>(4 * pool.num_threads(), (outputs + 63) / 64);
  const int32_t last = int32_t(list.inputs - 1);
  parallel_for(pool, ranges, [&](int64_t i) {
    for (int64_t n = 0; n < count; n++)
      for (int64_t o = outputs * i / ranges; o < outputs * (i + 1) / ranges; o++) {
        const Ends row(list, o);
        Vector sum[2] = {};
        int64_t k = row.from;
        for (; k + 2 * kLanes <= row.to; k += 2 * kLanes)
#pragma GCC unroll 2
          for (int j = 0; j < 2; j++)
            sum[j] += load(list.values + k + j * kLanes) * gather(x + n * list.inputs, list.index + k + j * kLanes, last);
        for (; k + kLanes <= row.to; k += kLanes) sum[0] += load(list.values + k) * gather(x + n * list.inputs, list.index + k, last);
        const Vector both = sum[0] + sum[1];
        float total = 0;
        for (int l = 0; l < kLanes; l++) total += both[l];
        for (; k < row.to; k++) total += list.values[k] * x[n * list.inputs + std::min(uint32_t(list.index[k]), uint32_t(last))];
        y[n * outputs + o] = total;
      }
  });
}

// How a frozen product is cut: tiles and blocks of source channels by what they take on one thread, so that the number of threads changes no
// bit, and pieces.
struct Cut {
  Threads threads;
  Pass pass;
  Pieces pieces;
  int64_t block;
};

// Nanoseconds of one core (measured): what a nonzero costs by itself; an output in a block, and looking up where its nonzeros of a block
// begin; a vector that is packed or written; a pixel's place. And what passes before another thread is at work.
inline constexpr double kNonzero = 0.5, kRow = 7, kSearch = 20, kVector = 3, kPlace = 0.7, kWake = 60e3;

// What it costs for each vector of the tile, by the bytes of the window. Where there are taps its operands lie pages apart.
inline double operand_cost(const Pass& pass, double window) {
  if (pass.vectors == kTile) return window < 50e3 ? 0.55 : 0.85;
  return window < 160e3 ? 0.55 : pass.positions() > pass.vectors ? 1.9 : 0.65;
}

inline Cut cut(const Threads& pool, const FrozenList& list, const Pass& shape, const Image& from) {
  const double nonzeros = double(list.pointer[list.rows()]) * double(list.block_rows * list.block_columns);
  const int64_t channels = list.inputs;
  Pass best;
  int64_t best_block = 0;
  double least = 0;
  for_patches(shape, from, list.block_rows * list.block_columns > 1, [&](const Pass& pass) {
    const int64_t positions = pass.positions(), tiles = pass.tiles(from.units());
    for (const double bytes : {40e3, 512e3}) {
      if (bytes < 50e3 && pass.vectors < kTile) continue;  // blocks gain nothing there
      const int64_t fits = std::max<int64_t>(kLanes, int64_t(bytes / double(positions * sizeof(Vector))) / kLanes * kLanes);
      const int64_t block = std::min(channels, (fits + list.block_rows - 1) / list.block_rows * list.block_rows);
      const double blocks = std::ceil(double(channels) / double(block)), vectors = double(pass.vectors);
      const double operand = vectors * operand_cost(pass, double(block * positions * sizeof(Vector)));
      const double rows = nonzeros * (kNonzero + operand) + double(list.outputs) * (blocks * kRow + vectors * kVector);
      const double window = double(positions) * (double(channels) * kVector + double(pass.lanes) * kPlace);
      const double time = double(tiles) * (rows + window) + double(list.rows()) * (blocks - 1) * kSearch;
      if (best_block && time >= least) continue;
      least = time, best = pass, best_block = block;
    }
  });
  const Threads threads(pool.pool, least > 2 * kWake ? INT64_MAX : 1);
  const int64_t tiles = best.tiles(from.units());
  return {threads, best, Pieces(threads, tiles, tiles, list.outputs, 4), best_block};
}

inline FrozenPlan make_frozen_plan(const Threads& pool, const FrozenList& list, const Pass& pass, const Geometry& g, int64_t block) {
  FrozenPlan plan{list, g.taps_y * g.taps_x, block, 0, pass.positions(), list.block_rows, list.block_columns, {}, {}, 0};
  const int64_t rows = list.rows(), units = (list.inputs + list.block_rows - 1) / list.block_rows;
  plan.blocks = (list.inputs + plan.block - 1) / plan.block;
  if (plan.positions >= INT32_MAX / (plan.block + 1)) throw std::bad_alloc();  // offsets in the window are int32

  int64_t size = 1;
  while (size < units * plan.taps) size *= 2;
  plan.mask = uint32_t(size - 1);
  plan.table.assign(size, int32_t(plan.block * plan.positions));  // the zeros behind the window
  for (int64_t t = 0; t < plan.taps; t++) {
    const int64_t y = pass.y.tap[t / g.taps_x], x = pass.x.tap[t % g.taps_x];
    if (y < 0 || x < 0) continue;
    const int64_t first = (y * pass.window_columns + x) * pass.groups;
    for (int64_t u = 0, channel = 0; u < units; u++, channel += list.block_rows) {
      if (channel == plan.block) channel = 0;
      plan.table[u * plan.taps + t] = int32_t(channel * plan.positions + first);
    }
  }

  plan.start.resize((plan.blocks + 1) * rows);
  const int64_t chunk = plan.blocks == 1 ? rows : 64;  // of rows, among which the threads search
  parallel_for(pool, (rows + chunk - 1) / chunk, [&](int64_t part) {
    for (int64_t r = part * chunk; r < std::min(rows, (part + 1) * chunk); r++) {
      const Ends row(list, r);
      plan.start[r] = row.from;
      plan.start[plan.blocks * rows + r] = row.to;
      for (int64_t b = 1; b < plan.blocks; b++) {
        const int64_t first = b * (plan.block / list.block_rows) * plan.taps, before = plan.start[(b - 1) * rows + r];
        plan.start[b * rows + r] = std::lower_bound(list.index + before, list.index + row.to, int32_t(first)) - list.index;
      }
    }
  });
  return plan;
}

}  // namespace sparse_jax
