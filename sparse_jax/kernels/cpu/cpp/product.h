// The product of a sparse or a dense kernel with packed tiles, which the forward pass and the input gradient share.
#pragma once

#include "dense.h"
#include "finish.h"
#include "frozen.h"
#include "sparse.h"

namespace sparse_jax {

// Of each thread.
inline thread_local Scratch window_scratch, tile_scratch, pixel_scratch, place_scratch, sum_scratch, waiting_scratch;

struct Source {
  const float* data;
  Image image;
  Activation activation;
};

// The places of one tile in source and destination.
struct Places {
  int64_t *source, *destination;
  int64_t valid = 0;  // destination pixels, where images lie by lanes

  Places(const Pass& pass, const Image& from, const Image& to, int64_t t) {
    source = pixel_scratch.get<int64_t>(pass.positions() * pass.lanes);
    destination = place_scratch.get<int64_t>(pass.vectors * pass.lanes);
    const Tile tile(pass, from.units(), t);
    tile.sources(pass, from, source);
    tile.destinations(pass, to, destination);
    if (from.by_lanes)
      for (int64_t i = 0; i < pass.vectors; i++) valid += destination[i] >= 0;
  }
};

// Fetches the pixels of the next block of channels while the block before is at work, some after each of its rows: packing them then
// finds them in the first or second cache, and takes half of the time.
class Ahead {
 public:
  Ahead(const Source& from, const Pass& pass, const int64_t* pixels, int64_t first, int64_t last, int64_t rows)
      : from_(from), pixels_(pixels), first_(first), length_(from.image.by_lanes ? std::max<int64_t>(0, last - first) : first < last) {
    lines_ = pass.positions() * pass.lanes * length_;
    each_ = (lines_ + rows - 1) / std::max<int64_t>(1, rows);
  }
  void some() {
    for (const int64_t end = std::min(lines_, line_ + each_); line_ < end; line_++) {
      if (pixels_[pixel_] >= 0) __builtin_prefetch(from_.data + pixels_[pixel_] + (first_ + channel_) * from_.image.channel_stride());
      if (++channel_ == length_) channel_ = 0, pixel_++;
    }
  }

 private:
  const Source& from_;
  const int64_t* pixels_;
  int64_t first_, length_, lines_, each_, line_ = 0, pixel_ = 0, channel_ = 0;
};

inline int64_t row_stride(const Pass& pass) { return pass.y.stride * pass.window_columns * pass.groups; }

// The rows [first, last) of a tile from one block of source channels, which is packed in `window`, by each kind of kernel. `meanwhile` is
// called after each row.
template <int ROWS, int COLUMNS, int S, int V, typename F>
inline void multiply(const Plan& plan, const Pass& pass, const Vector* window, int64_t b, int64_t first, int64_t last, Vector* sums, F meanwhile) {
  for (int64_t r = first; r < last; r++, meanwhile())
    if (b == 0 || plan.begin(b, r) != plan.end(b, r))
      accumulate<ROWS, COLUMNS, S, V>(window, row_stride(pass), pass.x.stride, Entries{plan.begin(b, r)}, Entries{plan.end(b, r)}, b == 0,
                                      sums + (r - first) * V);
}

template <int ROWS, int COLUMNS, int S, int V, typename F>
inline void multiply(const DensePlan& plan, const Pass& pass, const Vector* window, int64_t b, int64_t first, int64_t last, Vector* sums, F) {
  static_assert(V == kTile);
  for (int64_t r = first; r < last; r += kOutputs)
    dense_accumulate<ROWS, COLUMNS, S>(window, row_stride(pass), pass.x.stride, plan.offset.data(), plan.length(b),
                                       plan.panel(b, r / kOutputs), b == 0, sums + (r - first) * V);
}

template <int ROWS, int COLUMNS, int S, int V, typename F>
inline void multiply(const FrozenPlan& plan, const Pass& pass, const Vector* window, int64_t b, int64_t first, int64_t last, Vector* sums, F meanwhile) {
  const int64_t stride = row_stride(pass);
  for (int64_t r = first; r < last; r++, meanwhile()) {
    Vector* out = sums + (r - first) * V;
    if (plan.block_rows * plan.block_columns == 1) {
      accumulate<ROWS, COLUMNS, S, V>(window, stride, pass.x.stride, plan.begin(b, r), plan.end(b, r), b == 0, out);
      continue;
    }
    if (b == 0) std::fill(out, out + V, Vector{});
    if constexpr (V == kTile)
      plan.for_units(b, r, [&](Run begin, Run end) { accumulate<ROWS, COLUMNS, S, V>(window, stride, pass.x.stride, begin, end, false, out); });
  }
}

// Destination = kernel applied to source: the forward product, or a phase of the transposed one. finish(tile, places, first and last
// channel, part, pixels of the part before, pixels of the tile) writes the channels' tiles.
template <typename AnyPlan, typename Finish>
inline void product(const Threads& pool, const AnyPlan& plan, const Pass& pass, const Source& from, const Image& to, const Pieces& pieces,
                    bool seen_before, const Finish& finish) {
  if (pass.y.count <= 0 || pass.x.count <= 0 || from.image.count == 0) return;
  const int64_t positions = pass.positions(), channels = from.image.channels;
  parallel_for(pool, pieces.count(), [&](int64_t i) {
    const int64_t first = pieces.first(i), last = pieces.last(i);
    Vector* window = window_scratch.get<Vector>((plan.block + 1) * positions);
    std::fill(window + plan.block * positions, window + (plan.block + 1) * positions, Vector{});  // for taps that meet no image
    Vector* sums = tile_scratch.get<Vector>((last - first + kOutputs) * pass.vectors);
    double seen = seen_before ? 1 : 0;
    for (int64_t t = pieces.first_tile(i); t < pieces.last_tile(i); t++) {
      const Places places(pass, from.image, to, t);
      dispatch<Finish::kSmall>(pass, [&](auto rows, auto columns, auto s, auto vectors) {
        for (int64_t b = 0; b < plan.blocks; b++) {
          pack(from.data, from.image, from.activation, places.source, positions, b * plan.block, std::min(channels, (b + 1) * plan.block),
               window);
          Ahead ahead(from, pass, places.source, (b + 1) * plan.block, std::min(channels, (b + 2) * plan.block), last - first);
          multiply<rows, columns, s, vectors>(plan, pass, window, b, first, last, sums, [&] { ahead.some(); });
        }
      });
      finish(sums, places.destination, first, last, pieces.part(i), seen, places.valid);
      seen += double(places.valid);
    }
    fence();
  });
}

// With the plan that a list asks for.
template <typename Finish>
inline void product(const Threads& pool, const List& list, const Pass& pass, const Geometry& g, const float* w, const Source& from,
                    const Image& to, const Pieces& pieces, bool seen_before, const Finish& finish) {
  if (pass.y.count <= 0 || pass.x.count <= 0 || from.image.count == 0) return;
  check(!(Finish::kSmall && list.dense()), "of images by channels there must be one");
  Lease scratch;
  if constexpr (!Finish::kSmall)
    if (list.dense()) return product(pool, make_dense_plan(pool, list, pass, g, w, scratch), pass, from, to, pieces, seen_before, finish);
  product(pool, make_plan(pool, list, pass, g, w, scratch), pass, from, to, pieces, seen_before, finish);
}

// The epilogue of images by channels.
struct Plainly {
  static constexpr bool kSmall = true;  // whether tiles may be smaller than kTile
  float* to;
  int64_t vectors;
  void operator()(const Vector* sums, const int64_t* places, int64_t first, int64_t last, int64_t, double, int64_t) const {
    unpack(sums, vectors, places, first, last, to);
  }
};

// That of images by lanes.
template <typename F>
struct EachChannel {
  static constexpr bool kSmall = false;
  F f;
  void operator()(const Vector* sums, const int64_t* places, int64_t first, int64_t last, int64_t part, double seen, int64_t valid) const {
    for (int64_t r = first; r < last; r++) f(sums + (r - first) * kTile, places, r, part, seen, valid);
  }
};

}  // namespace sparse_jax
