// The inner loops of a dense kernel over the same packed windows: several channels share each operand that is loaded.
#pragma once

#include "plan.h"

namespace sparse_jax {

inline constexpr int kOutputs = 4;  // destination channels at once; with a quarter of a tile: as many sums as a tile has vectors

// Weights in the order of use: [block][group of kOutputs destination channels][source channel in the block][tap of this pass][kOutputs].
struct DensePlan {
  int64_t block, blocks, rows, groups, taps, sources;
  std::vector<int32_t> offset;  // of each (source channel in a block, tap) in the packed window
  float* weights;

  int64_t length(int64_t b) const { return std::min(block, sources - b * block) * taps; }
  const float* panel(int64_t b, int64_t group) const { return weights + (b * groups + group) * block * taps * kOutputs; }
};

inline int64_t dense_block(const Pass& pass, int64_t sources) {
  const double bytes = double(pass.positions()) * sizeof(Vector);
  return std::min(sources, std::max<int64_t>(4, int64_t(40e3 / bytes) / 4 * 4));
}

inline DensePlan make_dense_plan(const Threads& pool, const List& list, const Pass& pass, const Geometry& g, const float* values,
                                 Lease& scratch) {
  const int64_t sources = list.transposed ? list.outputs : list.inputs, rows = list.transposed ? list.inputs : list.outputs;
  DensePlan plan{dense_block(pass, sources), 0, rows, (rows + kOutputs - 1) / kOutputs, 0, sources, {}, nullptr};
  plan.blocks = (sources + plan.block - 1) / plan.block;
  std::vector<int64_t> taps;
  std::vector<int32_t> in_window;
  for (int64_t t = 0; t < g.taps_y * g.taps_x; t++) {
    const int64_t y = pass.y.tap[t / g.taps_x], x = pass.x.tap[t % g.taps_x];
    if (y < 0 || x < 0) continue;
    taps.push_back(t);
    in_window.push_back(int32_t((y * pass.window_columns + x) * pass.groups));
  }
  plan.taps = int64_t(taps.size());
  for (int64_t c = 0; c < plan.block; c++)
    for (int32_t offset : in_window) plan.offset.push_back(int32_t(c * pass.positions()) + offset);
  plan.weights = scratch.get<float>(plan.blocks * plan.groups * plan.block * plan.taps * kOutputs + 1);
  parallel_for(pool, plan.groups, [&](int64_t group) {
    for (int64_t b = 0; b < plan.blocks; b++) {
      float* out = plan.weights + (b * plan.groups + group) * plan.block * plan.taps * kOutputs;
      for (int64_t source = b * plan.block; source < std::min(sources, (b + 1) * plan.block); source++)
        for (int64_t t : taps)
          for (int64_t r = group * kOutputs; r < (group + 1) * kOutputs; r++) {
            const int64_t input = list.transposed ? r : source, output = list.transposed ? source : r;
            *out++ = r < rows ? values[(t * list.inputs + input) * list.outputs + output] : 0.0f;
          }
    }
  });
  return plan;
}

// kOutputs destination channels from one block. A quarter of a tile at a time, so that sums and operands fit into the registers.
template <int ROWS, int COLUMNS, int S>
inline void dense_accumulate(const Vector* window, int64_t row_stride, int64_t stride, const int32_t* offset, int64_t length,
                             const float* weights, bool first, Vector* out) {
  constexpr int G = kTile / (ROWS * COLUMNS), kPart = kTile / kOutputs;
  const int64_t s = S ? S : stride;
#pragma GCC unroll 4
  for (int q = 0; q < kOutputs; q++) {
    Vector sum[kOutputs][kPart];
    int64_t place[kPart];
#pragma GCC unroll 4
    for (int i = 0; i < kPart; i++) {
      const int p = q * kPart + i;
      place[i] = p / G / COLUMNS * row_stride + p / G % COLUMNS * s * G + p % G;
    }
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; o++)
#pragma GCC unroll 4
      for (int i = 0; i < kPart; i++) sum[o][i] = first ? Vector{} : out[o * kTile + q * kPart + i];
    const float* w = weights;
    for (int64_t k = 0; k < length; k++, w += kOutputs) {
      const Vector* x = window + offset[k];
#pragma GCC unroll 4
      for (int i = 0; i < kPart; i++) {
        const Vector v = x[place[i]];
#pragma GCC unroll 4
        for (int o = 0; o < kOutputs; o++) sum[o][i] += v * w[o];
      }
    }
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; o++)
#pragma GCC unroll 4
      for (int i = 0; i < kPart; i++) out[o * kTile + q * kPart + i] = sum[o][i];
  }
}

// The weight gradient of all positions. Here output channels are lanes: a pixel of one image and one (input channel, tap) is a factor,
// kWide vectors of output gradients are the operands, and nothing is summed over lanes.
inline constexpr int kWide = 2, kPairs = kTile / 2;  // vectors of outputs, (channel, tap) pairs: kTile sums
inline constexpr int64_t kPanel = kWide * kLanes;

// Transposes a tile's gradients [output][position][lane] into [panel][position][lane][kPanel outputs].
inline void transpose_outputs(const Vector* gradients, int64_t outputs, float* out) {
  for (int64_t first = 0; first < outputs; first += kLanes)
    for (int64_t p = 0; p < kTile; p++) {
      Vector rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) rows[i] = first + i < outputs ? gradients[(first + i) * kTile + p] : Vector{};
      transpose(rows);
      float* to = out + (first / kPanel * kTile + p) * kLanes * kPanel + first % kPanel;
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; l++) store(to + l * kPanel, rows[l]);
    }
}

// sums[pair][kPanel] += over the tile's pixels and images: window value of the pair times the panel's gradients.
template <int ROWS, int COLUMNS, int S>
inline void dense_dot(const Vector* window, int64_t row_stride, int64_t stride, const int32_t* offset, int pairs, const float* panel,
                      bool first, float* out) {
  constexpr int G = kTile / (ROWS * COLUMNS);
  const int64_t s = S ? S : stride;
  Vector sum[kPairs][kWide];
  const Vector* from[kPairs];
#pragma GCC unroll 8
  for (int k = 0; k < kPairs; k++) {
    from[k] = window + offset[k < pairs ? k : 0];
#pragma GCC unroll 2
    for (int i = 0; i < kWide; i++) sum[k][i] = Vector{};
  }
  const float* dy = panel;
  for (int p = 0; p < kTile; p++) {
    const int64_t place = (p / G / COLUMNS * row_stride + p / G % COLUMNS * s * G + p % G) * kLanes;
    const float* x[kPairs];
#pragma GCC unroll 8
    for (int k = 0; k < kPairs; k++) x[k] = reinterpret_cast<const float*>(from[k]) + place;
    for (int l = 0; l < kLanes; l++, dy += kPanel) {
      Vector v[kWide];
#pragma GCC unroll 2
      for (int i = 0; i < kWide; i++) v[i] = load(dy + i * kLanes);
#pragma GCC unroll 8
      for (int k = 0; k < kPairs; k++)
#pragma GCC unroll 2
        for (int i = 0; i < kWide; i++) sum[k][i] += v[i] * x[k][l];
    }
  }
  for (int k = 0; k < pairs; k++)
#pragma GCC unroll 2
    for (int i = 0; i < kWide; i++) {
      float* to = out + k * kPanel + i * kLanes;
      store(to, first ? sum[k][i] : load(to) + sum[k][i]);
    }
}

}  // namespace sparse_jax
