// What is done to a tile's sums on their way to memory, where images lie by lanes.
#pragma once

#include "tiles.h"

namespace sparse_jax {

// Two sums over the pixels of each channel, lane by lane, of each part of the tiles; reduced in a fixed order at the end, so that they are
// the same with any number of threads. Each part's places are written by one thread.
struct Sums {
  Vector* first;   // [parts][channels]
  Vector* second;
  int64_t channels;
};

// Mean and sum of squared deviations of n and of m values, put together (Chan et al., 1979): no difference of large sums.
template <typename T>
inline void combine(T& mean, T& squares, double n, T other_mean, T other_squares, double m) {
  const T delta = other_mean - mean;
  mean += delta * T(m / (n + m));
  squares += other_squares + delta * delta * T(n * m / (n + m));
}
template <>
inline void combine<Vector>(Vector& mean, Vector& squares, double n, Vector other_mean, Vector other_squares, double m) {
  const Vector delta = other_mean - mean;
  mean += delta * broadcast(float(m / (n + m)));
  squares += other_squares + delta * delta * broadcast(float(n * m / (n + m)));
}

// Writes a channel's tile, after adding the residual if there is one, and takes mean and squared deviations of what it wrote.
struct Forward {
  const float* residual;  // null: none
  float* to;
  bool past_caches;
  const Sums* sums;  // null: not wanted

  // seen: pixels of this part before this tile; valid: of this tile.
  void operator()(const Vector* tile, const int64_t* places, int64_t channel, int64_t part, double seen, int64_t valid) const {
    Vector value[kTile], total = {};
    const int64_t offset = channel * kBatch;
#pragma GCC unroll 16
    for (int i = 0; i < kTile; i++) {
      value[i] = tile[i];
      if (places[i] < 0) continue;
      if (residual) value[i] += load(residual + places[i] + offset);
      float* out = to + places[i] + offset;
      past_caches ? store_past_caches(out, value[i]) : store(out, value[i]);
      total += value[i];
    }
    if (!sums || valid == 0) return;
    const Vector mean = total * broadcast(1.0f / float(valid));
    Vector squares = {};
#pragma GCC unroll 16
    for (int i = 0; i < kTile; i++) {
      const Vector d = value[i] - mean;
      if (places[i] >= 0) squares += d * d;
    }
    const int64_t at = part * sums->channels + channel;
    if (seen == 0)
      sums->first[at] = mean, sums->second[at] = squares;
    else
      combine(sums->first[at], sums->second[at], seen, mean, squares, double(valid));
  }
};

// The derivative of max((x - mean) * scale + bias, 0): with g where that is positive, else 0, writes scale * g, and sums g and g (x - mean).
struct Backward {
  const float* x;
  Activation f;  // null: the gradient as it is
  float* to;
  bool past_caches;
  const Sums* sums;

  void operator()(const Vector* tile, const int64_t* places, int64_t channel, int64_t part, double seen, int64_t) const {
    const int64_t offset = channel * kBatch;
    if (!f.mean) {
      for (int i = 0; i < kTile; i++)
        if (places[i] >= 0) store(to + places[i] + offset, tile[i]);
      return;
    }
    const Vector mean = broadcast(f.mean[channel]), scale = broadcast(f.scale[channel]), bias = broadcast(f.bias[channel]);
    Vector total = {}, weighted = {};
#pragma GCC unroll 16
    for (int i = 0; i < kTile; i++) {
      if (places[i] < 0) continue;
      const Vector centred = load(x + places[i] + offset) - mean;
      const Indices passes = centred * scale + bias > Vector{};
      const Vector g = reinterpret_cast<Vector>(reinterpret_cast<Indices>(tile[i]) & passes);
      float* out = to + places[i] + offset;
      past_caches ? store_past_caches(out, g * scale) : store(out, g * scale);
      total += g;
      weighted += g * centred;
    }
    const int64_t at = part * sums->channels + channel;
    sums->first[at] = seen == 0 ? total : sums->first[at] + total;
    sums->second[at] = seen == 0 ? weighted : sums->second[at] + weighted;
  }
};

}  // namespace sparse_jax
