// Matrix products of few rows. A nonzero is used for a vector or a few, so that anything that is done to prepare it costs more than its
// product: here the list is walked as it is, in the order in which the dense weight lies in memory, and each weight is read where it is
// used. The rows are lanes: x and dy are packed as [channel][V vectors].
//
// The limits. Operations: V multiply-adds a nonzero. Bytes: the lines of the dense weight that hold a nonzero, nearly all of them at 5%; of a
// compact one the nonzeros, in their order.
#pragma once

#include "product.h"

namespace sparse_jax {

// Whether a product is one of these: single weights, one tile of single pixels.
inline bool is_few_rows(const List& list, const Pass& pass, const Geometry& g, const Image& from, const Image& to) {
  const bool matrix = g.taps_y * g.taps_x == 1 && from.height * from.width == 1 && to.height * to.width == 1;
  return matrix && !from.by_lanes && !list.dense() && list.block_rows * list.block_columns == 1 && pass.tiles(from.units()) == 1;
}

inline constexpr int64_t kSums = 256 << 10;  // bytes of sums that stay in the second cache

template <bool COMPACT>
struct FewRows {
  Threads threads;
  const List& list;
  const Pass& pass;
  const float* w;

  // Where the kernel holds the k-th of its nonzeros.
  int64_t place(int64_t k, int64_t input, int64_t output) const { return COMPACT ? k : input * list.outputs + output; }

  // Pieces by the work, whoever does it: each of some 50 microseconds.
  int64_t parts(int64_t most) const {
    return std::max<int64_t>(1, std::min({most, list.inputs / kLanes, list.pointer[list.inputs] * (pass.vectors + 1) / 32768}));
  }
  static int64_t range(int64_t part, int64_t parts, int64_t channels) { return part == parts ? channels : channels * part / parts / kLanes * kLanes; }
  template <typename F>
  void run(int64_t parts, F f) const {
    parallel_for(parts == 1 ? Threads(threads.pool, 1) : threads, parts, f);
  }

  // Calls visit(k, output) for each nonzero of an input whose output is in [low, high); they are checked here. The next input's weights, which
  // lie a row further, are fetched meanwhile.
  template <typename F>
  void for_row(int64_t input, int64_t low, int64_t high, F visit) const {
    const int64_t from = list.pointer[input], to = list.pointer[input + 1];
    check(0 <= from && from <= to && to <= list.indices, "its pointers leave its indices");
    const bool whole = low == 0 && high == list.outputs;
    int64_t k = whole ? from : std::lower_bound(list.index + from, list.index + to, int32_t(low)) - list.index;
    const int64_t after = w && !COMPACT && input + 1 < list.inputs ? std::min(int64_t(list.pointer[input + 2]), list.indices) : 0;
    const float* row = w + (input + 1) * list.outputs;
    for (; k < to; k++) {
      const uint32_t output = uint32_t(list.index[k]);
      if (output - uint32_t(low) >= uint32_t(high - low)) {
        check(output < uint32_t(list.outputs), "an index lies beyond its outputs and taps");
        break;
      }
      if (k - from + to < after) __builtin_prefetch(row + list.index[k - from + to]);
      visit(k, int64_t(output));
    }
  }

  void pack_into(const Source& from, const int64_t* pixels, int64_t first, int64_t last, Vector* out) const {
    pack(from.data, from.image, {}, pixels, pass.vectors, first, last, out);
  }
  void pack_all(const Source& from, const int64_t* pixels, Vector* out) const {
    const int64_t channels = from.image.channels, chunk = 16 * kLanes;
    parallel_for(channels * pass.vectors < 4096 ? Threads(threads.pool, 1) : threads, (channels + chunk - 1) / chunk, [&](int64_t i) {
      pack_into(from, pixels, i * chunk, std::min(channels, (i + 1) * chunk), out + i * chunk * pass.vectors);
    });
  }

  // y[o] = sum over i of w[i, o] x[i]. The sums are not in registers but in the second cache: a piece has some outputs to itself, and of each
  // input the nonzeros among them. No sum reaches over pieces.
  template <int V>
  void forward(const Source& x, const Places& places, float* y) const {
    const int64_t outputs = list.outputs, channels = list.inputs;
    const int64_t fits = (outputs * V * int64_t(sizeof(Vector)) + kSums - 1) / kSums;
    const int64_t count = std::max<int64_t>(1, std::min(std::max(fits, parts(4)), outputs / kLanes));
    Lease lease;
    Vector* rows = lease.get<Vector>(channels * V);
    pack_all(x, places.source, rows);
    run(count, [&](int64_t part) {
      const int64_t low = range(part, count, outputs), high = range(part + 1, count, outputs);
      Vector* sums = tile_scratch.get<Vector>((high - low) * V);
      std::fill(sums, sums + (high - low) * V, Vector{});
      for (int64_t input = 0; input < channels; input++) {
        Vector operand[V];
#pragma GCC unroll 16
        for (int i = 0; i < V; i++) operand[i] = rows[input * V + i];
        for_row(input, low, high, [&](int64_t k, int64_t output) __attribute__((always_inline)) {
          const Vector weight = broadcast(w[place(k, input, output)]);
#pragma GCC unroll 16
          for (int i = 0; i < V; i++) sums[(output - low) * V + i] += weight * operand[i];
        });
      }
      unpack(sums, V, places.destination, low, high, y);
    });
  }

  // dx[i] = sum over o of w[i, o] dy[o].
  template <int V>
  void input_gradient(const Source& dy, const Places& places, float* dx) const {
    Lease lease;
    Vector* gradients = lease.get<Vector>(list.outputs * V);
    pack_all(dy, places.source, gradients);
    const int64_t count = parts(64);
    run(count, [&](int64_t part) {
      Vector* sums = tile_scratch.get<Vector>(kLanes * V);
      for (int64_t first = range(part, count, list.inputs); first < range(part + 1, count, list.inputs); first += kLanes) {
        const int64_t last = std::min(range(part + 1, count, list.inputs), first + kLanes);
        for (int64_t input = first; input < last; input++) {
          Vector sum[V] = {};
          for_row(input, 0, list.outputs, [&](int64_t k, int64_t output) __attribute__((always_inline)) {
            const Vector weight = broadcast(w[place(k, input, output)]);
#pragma GCC unroll 16
            for (int i = 0; i < V; i++) sum[i] += weight * gradients[output * V + i];
          });
#pragma GCC unroll 16
          for (int i = 0; i < V; i++) sums[(input - first) * V + i] = sum[i];
        }
        unpack(sums, V, places.destination, first, last, dx);
      }
    });
  }

  // dw[i, o] = x[i] . dy[o] where there is a nonzero. Of a dense array the others are 0: a row is cleared and filled while it is in the first
  // cache.
  template <int V>
  void weight_gradient(const Source& x, const Source& dy, const Places& places, float* dw) const {
    const int64_t outputs = list.outputs;
    Lease lease;
    Vector* gradients = lease.get<Vector>(outputs * V);
    pack_all(dy, places.destination, gradients);
    const int64_t count = std::max(parts(64), std::min(list.inputs / kLanes, list.inputs * outputs / (1 << 18)));
    run(count, [&](int64_t part) {
      Vector* rows = window_scratch.get<Vector>(kLanes * V);
      Vector* waiting = waiting_scratch.get<Vector>(outputs + kLanes);
      for (int64_t first = range(part, count, list.inputs); first < range(part + 1, count, list.inputs); first += kLanes) {
        const int64_t last = std::min(range(part + 1, count, list.inputs), first + kLanes);
        pack_into(x, places.source, first, last, rows);
        for (int64_t input = first; input < last; input++) {
          if (!COMPACT) std::fill_n(dw + input * outputs, outputs, 0.0f);
          Vector operand[V];
#pragma GCC unroll 16
          for (int i = 0; i < V; i++) operand[i] = rows[(input - first) * V + i];
          const int64_t begin = list.pointer[input], length = list.pointer[input + 1] - begin;
          check(length <= outputs, "an input has more weights than there are outputs");
          for_row(input, 0, outputs, [&](int64_t k, int64_t output) __attribute__((always_inline)) {
            Vector sum[2] = {};
#pragma GCC unroll 16
            for (int i = 0; i < V; i++) sum[i % 2] = i < 2 ? operand[i] * gradients[output * V + i] : sum[i % 2] + operand[i] * gradients[output * V + i];
            waiting[k - begin] = sum[0] + sum[1];
          });
          for (int64_t k = 0; k < length; k += kLanes) {
            Vector v[kLanes];
            const int64_t have = std::min<int64_t>(kLanes, length - k);
#pragma GCC unroll 16
            for (int l = 0; l < kLanes; l++) v[l] = l < have ? waiting[k + l] : Vector{};
            const Vector sums = lane_sums(v);
            for (int64_t l = 0; l < have; l++) dw[place(begin + k + l, input, list.index[begin + k + l])] = sums[l];
          }
        }
      }
    });
  }
};

// Calls f with the product and with the tile's vectors as a compile-time number.
template <typename F>
inline void few_rows(const Threads& threads, const List& list, const Pass& pass, const float* w, F f) {
  check(list.pointers > list.inputs, "it has too few pointers for its inputs");
  auto with = [&](auto product) {
    switch (pass.vectors) {
      case 1: return f(product, number<1>);
      case 2: return f(product, number<2>);
      case 4: return f(product, number<4>);
      case 8: return f(product, number<8>);
      default: return f(product, number<kTile>);
    }
  };
  if (list.compact) with(FewRows<true>{threads, list, pass, w});
  else with(FewRows<false>{threads, list, pass, w});
}

}  // namespace sparse_jax
