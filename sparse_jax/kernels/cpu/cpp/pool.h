// Maxima over windows that do not overlap, of images by lanes, after normalisation and ReLU; and their gradient.
#pragma once

#include <stdexcept>

#include "finish.h"

namespace sparse_jax {

inline constexpr int kMaxWindow = 16;

struct Pool {
  Image from, to;
  int64_t rows, columns;

  int64_t window() const { return rows * columns; }
  void check() const {
    if (rows < 1 || columns < 1 || window() > kMaxWindow || to.height > from.height / rows || to.width > from.width / columns)
      throw std::invalid_argument("sparse_jax: no such pooling window");
  }
  // Where the pixels of a window begin, row by row.
  void sources(int64_t unit, int64_t row, int64_t column, int64_t* out) const {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) *out++ = from.at(unit, row * rows + r, column * columns + c);
  }
};

struct Activated {
  Vector mean, scale, bias;
  bool there;
  Activated(const Activation& f, int64_t channel) : mean{}, scale{}, bias{}, there(f.mean) {
    if (there) mean = broadcast(f.mean[channel]), scale = broadcast(f.scale[channel]), bias = broadcast(f.bias[channel]);
  }
  Vector operator()(Vector v) const { return there ? relu((v - mean) * scale + bias) : v; }
};

inline Vector choose(Indices condition, Vector a, Vector b) {
  return reinterpret_cast<Vector>((reinterpret_cast<Indices>(a) & condition) | (reinterpret_cast<Indices>(b) & ~condition));
}

// NaN wins, as in jnp.maximum.
inline Vector maximum(Vector a, Vector b) { return choose((a > b) | (a != a), a, b); }

inline void pool_forward(ffi::ThreadPool& threads, const Pool& pool, const Activation& f, const float* x, float* y) {
  const int64_t rows = pool.to.units() * pool.to.height;
  parallel_for(threads, rows, [&](int64_t i) {
    const int64_t unit = i / pool.to.height, row = i % pool.to.height;
    for (int64_t column = 0; column < pool.to.width; column++) {
      int64_t place[kMaxWindow];
      pool.sources(unit, row, column, place);
      float* out = y + pool.to.at(unit, row, column);
      for (int64_t c = 0; c < pool.to.channels; c++) {
        const Activated activated(f, c);
        Vector best = activated(load(x + place[0] + c * kBatch));
        for (int64_t k = 1; k < pool.window(); k++) best = maximum(best, activated(load(x + place[k] + c * kBatch)));
        store(out + c * kBatch, best);
      }
    }
  });
}

// The gradient of max(max(max(a, b), c), d) as jnp.maximum has it: to the larger one, in halves to two that are equal.
inline void pool_backward(ffi::ThreadPool& threads, const Pool& pool, const Activation& f, const float* x, const float* dy, float* dx,
                          const Sums* sums, int64_t parts) {
  const int64_t rows = pool.to.units() * pool.to.height, channels = pool.to.channels, window = pool.window();
  const bool whole = pool.from.height == pool.to.height * pool.rows && pool.from.width == pool.to.width * pool.columns;
  if (!whole) std::fill(dx, dx + pool.from.count * pool.from.height * pool.from.width * channels, 0.0f);
  parallel_for(threads, parts, [&](int64_t part) {
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; i++) {
      const int64_t unit = i / pool.to.height, row = i % pool.to.height;
      for (int64_t column = 0; column < pool.to.width; column++) {
        int64_t place[kMaxWindow];
        pool.sources(unit, row, column, place);
        const float* gradient = dy + pool.to.at(unit, row, column);
        for (int64_t c = 0; c < channels; c++) {
          const Activated activated(f, c);
          Vector value[kMaxWindow], best[kMaxWindow];
          for (int64_t k = 0; k < window; k++) {
            value[k] = activated(load(x + place[k] + c * kBatch));
            best[k] = k ? maximum(best[k - 1], value[k]) : value[k];
          }
          Vector g = load(gradient + c * kBatch), total = {}, weighted = {};
          for (int64_t k = window - 1; k >= 0; k--) {
            Vector mine = g;
            if (k) {
              const Vector half = g * broadcast(0.5f), before = best[k - 1];
              mine = choose(value[k] > before, g, choose(value[k] == before, half, Vector{}));
              g -= mine;
            }
            if (f.mean) {
              mine = choose(value[k] > Vector{}, mine, Vector{});
              total += mine;
              weighted += mine * (load(x + place[k] + c * kBatch) - activated.mean);
              mine *= activated.scale;
            }
            store(dx + place[k] + c * kBatch, mine);
          }
          if (f.mean) sums->first[part * channels + c] += total, sums->second[part * channels + c] += weighted;
        }
      }
    }
  });
}

}  // namespace sparse_jax
