// The product of a sparse or a dense kernel with packed tiles, which the forward pass and the input gradient share.
#pragma once

#include "dense.h"
#include "finish.h"
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
    destination = place_scratch.get<int64_t>(kTile * pass.lanes);
    const Tile tile(pass, from.units(), t);
    tile.sources(pass, from, source);
    tile.destinations(pass, to, destination);
    if (from.by_lanes)
      for (int64_t i = 0; i < kTile; i++) valid += destination[i] >= 0;
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

// Destination = kernel applied to source: the forward product, or a phase of the transposed one. finish(tile, places, channel, part,
// pixels of the part before, pixels of the tile) writes a channel's tile; without it (null) destination is written as it is.
template <typename Finish>
inline void product(ffi::ThreadPool& pool, const List& list, const Pass& pass, const Geometry& g, const float* w, const Source& from,
             const Image& to, const Pieces& pieces, bool seen_before, const Finish& finish) {
  if (pass.y.count <= 0 || pass.x.count <= 0 || from.image.count == 0) return;
  Lease plan_scratch;
  Plan plan;
  DensePlan dense;
  if (!list.dense())
    plan = make_plan(pool, list, pass, g, w, plan_scratch);
  else
    dense = make_dense_plan(pool, list, pass, g, w, plan_scratch);
  const int64_t positions = pass.positions(), block = list.dense() ? dense.block : plan.block;
  const int64_t channels = from.image.channels, blocks = (channels + block - 1) / block, stride = row_stride(pass);
  parallel_for(pool, pieces.count(), [&](int64_t i) {
    const int64_t first = pieces.first(i), last = pieces.last(i);
    Vector* window = window_scratch.get<Vector>(block * positions);
    Vector* sums = tile_scratch.get<Vector>((last - first + kOutputs) * kTile);
    double seen = seen_before ? 1 : 0;
    for (int64_t t = pieces.first_tile(i); t < pieces.last_tile(i); t++) {
      const Places places(pass, from.image, to, t);
      dispatch(pass, [&](auto rows, auto columns, auto s) {
        for (int64_t b = 0; b < blocks; b++) {
          pack(from.data, from.image, from.activation, places.source, positions, b * block, std::min(channels, (b + 1) * block), window);
          if (!list.dense()) {
            Ahead ahead(from, pass, places.source, (b + 1) * block, std::min(channels, (b + 2) * block), last - first);
            for (int64_t r = first; r < last; r++, ahead.some())
              if (b == 0 || plan.begin(b, r) != plan.end(b, r))
                accumulate<rows, columns, s>(window, stride, pass.x.stride, plan.begin(b, r), plan.end(b, r), b == 0,
                                             sums + (r - first) * kTile);
          } else {
            for (int64_t r = first; r < last; r += kOutputs)
              dense_accumulate<rows, columns, s>(window, stride, pass.x.stride, dense.offset.data(), dense.length(b, channels),
                                                 dense.panel(b, r / kOutputs), b == 0, sums + (r - first) * kTile);
          }
        }
      });
      finish(sums, places.destination, first, last, pieces.part(i), seen, places.valid);
      seen += double(places.valid);
    }
    fence();
  });
}

// The epilogue of images by channels.
struct Plainly {
  float* to;
  void operator()(const Vector* sums, const int64_t* places, int64_t first, int64_t last, int64_t, double, int64_t) const {
    unpack(sums, places, first, last, to);
  }
};

// That of images by lanes.
template <typename F>
struct EachChannel {
  F f;
  void operator()(const Vector* sums, const int64_t* places, int64_t first, int64_t last, int64_t part, double seen, int64_t valid) const {
    for (int64_t r = first; r < last; r++) f(sums + (r - first) * kTile, places, r, part, seen, valid);
  }
};

}  // namespace sparse_jax
