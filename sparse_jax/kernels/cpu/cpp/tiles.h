// How images are cut into tiles: patches of output pixels as lanes, and the windows of source pixels that they need.
#pragma once

#include <climits>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace sparse_jax {

// Two layouts of images. By channels: [image][row][column][channel]. By lanes: [image / 16][row][column][channel][image % 16], where
// the same pixel of 16 images is one operand as it lies there.
inline constexpr int64_t kBatch = 16;

struct Image {
  int64_t count, height, width, channels;
  bool by_lanes = false;

  // What a tile is made of: images, whose patches are lanes; or vectors of images, each with one patch.
  int64_t units() const { return by_lanes ? count / kLanes : count; }
  int64_t channel_stride() const { return by_lanes ? kBatch : 1; }
  int64_t at(int64_t unit, int64_t row, int64_t column) const {
    if (!by_lanes) return ((unit * height + row) * width + column) * channels;
    const int64_t vectors = kBatch / kLanes;
    return ((unit / vectors * height + row) * width + column) * channels * kBatch + unit % vectors * kLanes;
  }
};

struct Geometry {
  int64_t taps_y, taps_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
};

// One pass: outputs at first + i * step for i < count, reading source pixels from i * stride + origin on.
struct Axis {
  int64_t count, first, step, stride, origin, window;
  std::vector<int64_t> tap;  // offset of each tap in the window; -1: not in this pass, or never on the source
};

struct Pass {
  Axis y, x;
  int64_t patch_rows = 0, patch_columns = 0, groups = 0;  // of a tile
  int64_t vectors = kTile;                                // in a tile: rows x columns x groups
  int64_t window_rows = 0, window_columns = 0;
  int64_t lanes = kLanes;  // patches in a vector: one where its lanes are images

  int64_t positions() const { return window_rows * window_columns * groups; }
  int64_t patches_y() const { return (y.count + patch_rows - 1) / patch_rows; }
  int64_t patches_x() const { return (x.count + patch_columns - 1) / patch_columns; }
  int64_t patches() const { return groups * lanes; }
  int64_t tiles(int64_t units) const { return (units * patches_y() * patches_x() + patches() - 1) / patches(); }
};

// Calls visit(pass) with each rectangle of a patch that is compiled. A few images by channels fill no tile of kTile vectors: smaller ones are
// for kernels of single weights only.
template <typename F>
inline void for_patches(Pass pass, const Image& from, bool whole, F visit) {
  pass.lanes = from.by_lanes ? 1 : kLanes;
  const int64_t side = kTile == 16 ? 4 : 2;
  const int64_t shapes[][3] = {{side, kTile / side, kTile}, {2, 2, kTile}, {1, 1, kTile}, {1, 1, 8}, {2, 2, 4}, {1, 1, 4}, {1, 1, 2}, {1, 1, 1}};
  for (const auto& shape : shapes) {
    if (shape[2] > kTile || ((from.by_lanes || whole) && shape[2] < kTile)) continue;
    pass.patch_rows = shape[0];
    pass.patch_columns = shape[1];
    pass.vectors = shape[2];
    pass.groups = pass.vectors / (shape[0] * shape[1]);
    pass.window_rows = (pass.patch_rows - 1) * pass.y.stride + pass.y.window;
    pass.window_columns = (pass.patch_columns - 1) * pass.x.stride + pass.x.window;
    visit(pass);
  }
}

// The patch that wastes the least. Large squares share most of their window; a nonzero costs about one vector more than its tile has.
inline void choose_patch(Pass& pass, const Image& from, bool whole) {
  double best = -1;
  for_patches(pass, from, whole, [&](const Pass& p) {
    const double done = double(p.tiles(from.units())) * double(p.vectors + 1);
    const double cost = done * (1 + 0.1 * double(p.window_rows * p.window_columns) / double(p.patch_rows * p.patch_columns));
    if (best >= 0 && cost >= best) return;
    best = cost;
    pass = p;
  });
}

// Puts the taps' offsets into the smallest window that holds those that ever meet the source: `shift` is where a tap of the first output
// reads, INT64_MAX that of one that is not in this pass. The others would read nothing but zeros around the image.
inline void choose_window(Axis& axis, const std::vector<int64_t>& shift, int64_t source) {
  int64_t low = INT64_MAX, high = INT64_MIN;
  auto meets = [&](int64_t s) { return s != INT64_MAX && s < source && s + (axis.count - 1) * axis.stride >= 0; };
  for (int64_t s : shift)
    if (meets(s)) low = std::min(low, s), high = std::max(high, s);
  if (low > high) low = high = 0;
  for (int64_t s : shift) axis.tap.push_back(meets(s) ? s - low : -1);
  axis.origin = low;
  axis.window = high - low + 1;
}

inline Axis forward_axis(int64_t count, int64_t source, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  Axis axis{count, 0, 1, stride, 0, 1, {}};
  std::vector<int64_t> shift;
  for (int64_t k = 0; k < taps; k++) shift.push_back(k * dilation - pad);
  choose_window(axis, shift, source);
  return axis;
}

// Input pixel phase + i * stride gets what outputs (phase + i * stride + pad - k * dilation) / stride made of it, where that divides.
inline Axis backward_axis(int64_t pixels, int64_t source, int64_t phase, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  Axis axis{(pixels - phase + stride - 1) / stride, phase, stride, 1, 0, 1, {}};
  std::vector<int64_t> shift;
  for (int64_t k = 0; k < taps; k++) {
    const int64_t numerator = phase + pad - k * dilation;
    shift.push_back(numerator % stride == 0 ? numerator / stride : INT64_MAX);
  }
  choose_window(axis, shift, source);
  return axis;
}

// The patches of a tile: of each its image (or vector of images) and its first pixel, in pixels of this pass.
struct Tile {
  int64_t unit[kTile * kLanes], y[kTile * kLanes], x[kTile * kLanes];  // unit -1: no such patch

  Tile(const Pass& pass, int64_t units, int64_t t) {
    const int64_t py = pass.patches_y(), px = pass.patches_x(), patches = pass.patches();
    for (int64_t j = 0; j < patches; j++) {
      const int64_t id = t * patches + j;
      unit[j] = id < units * py * px ? id / (py * px) : -1;
      y[j] = id / px % py * pass.patch_rows;
      x[j] = id % px * pass.patch_columns;
    }
  }

  // Source pixels of the window, [rows][columns][patches]: where each begins in its image array; -1: outside, which reads zero.
  void sources(const Pass& pass, const Image& from, int64_t* out) const {
    const int64_t patches = pass.patches(), step = from.by_lanes ? from.channels * kBatch : from.channels;  // of neighbouring pixels
    int64_t first[kTile * kLanes], row[kTile * kLanes], column[kTile * kLanes];
    for (int64_t j = 0; j < patches; j++) {
      row[j] = unit[j] < 0 ? INT32_MIN : y[j] * pass.y.stride + pass.y.origin;
      column[j] = x[j] * pass.x.stride + pass.x.origin;
      first[j] = unit[j] < 0 ? 0 : from.at(unit[j], 0, 0);
    }
    for (int64_t r = 0; r < pass.window_rows; r++)
      for (int64_t c = 0; c < pass.window_columns; c++, out += patches)
        for (int64_t j = 0; j < patches; j++) {
          const int64_t at_row = row[j] + r, at_column = column[j] + c;
          const bool inside = (at_row >= 0) & (at_row < from.height) & (at_column >= 0) & (at_column < from.width);
          out[j] = inside ? first[j] + (at_row * from.width + at_column) * step : -1;
        }
  }

  // Destination pixels of the patch, likewise; -1: beyond the last one of this pass.
  void destinations(const Pass& pass, const Image& to, int64_t* out) const {
    for (int64_t r = 0; r < pass.patch_rows; r++)
      for (int64_t c = 0; c < pass.patch_columns; c++)
        for (int64_t j = 0; j < pass.patches(); j++) {
          const bool inside = y[j] + r < pass.y.count && x[j] + c < pass.x.count;
          *out++ = inside ? at(j, pass.y.first + (y[j] + r) * pass.y.step, pass.x.first + (x[j] + c) * pass.x.step, to) : -1;
        }
  }

 private:
  int64_t at(int64_t j, int64_t row, int64_t column, const Image& image) const {
    const bool inside = unit[j] >= 0 && row >= 0 && row < image.height && column >= 0 && column < image.width;
    return inside ? image.at(unit[j], row, column) : -1;
  }
};

// What is done to a source's values while they are packed, channel by channel: max((x - mean) * scale + bias, 0); nothing where mean is
// null. Pixels outside of the image stay zero.
struct Activation {
  const float *mean = nullptr, *scale = nullptr, *bias = nullptr;
};

// NaN stays.
inline Vector relu(Vector v) { return v < Vector{} ? Vector{} : v; }

template <bool ACTIVATE>
inline void pack_by_lanes(const float* image, const Activation& f, const int64_t* pixels, int64_t positions, int64_t first, int64_t last,
                          Vector* out) {
  constexpr int kAtOnce = 4;  // channels whose numbers stay in registers
  for (int64_t c = first; c < last; c += kAtOnce, out += kAtOnce * positions) {
    const int64_t width = std::min<int64_t>(kAtOnce, last - c);
    Vector mean[kAtOnce] = {}, scale[kAtOnce] = {}, bias[kAtOnce] = {};
    if (ACTIVATE)
      for (int64_t i = 0; i < width; i++) {
        mean[i] = broadcast(f.mean[c + i]);
        scale[i] = broadcast(f.scale[c + i]);
        bias[i] = broadcast(f.bias[c + i]);
      }
    auto value = [&](const float* from, int i) {
      const Vector v = load(from + i * kBatch);
      return ACTIVATE ? relu((v - mean[i]) * scale[i] + bias[i]) : v;
    };
    for (int64_t p = 0; p < positions; p++) {
      if (pixels[p] < 0) {
        for (int64_t i = 0; i < width; i++) out[i * positions + p] = Vector{};
        continue;
      }
      const float* from = image + pixels[p] + c * kBatch;
      if (width == kAtOnce) {
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; i++) out[i * positions + p] = value(from, i);
      } else {
        for (int i = 0; i < width; i++) out[i * positions + p] = value(from, i);
      }
    }
  }
}

// Packs channels [first, last) of the pixels into out[channel - first][position]: squares of lanes x channels, read along the channels that lie
// side by side in memory, transposed in registers, written along the lanes.
inline void pack_by_channels(const float* image, const int64_t* pixels, int64_t positions, int64_t first, int64_t last, Vector* out) {
  alignas(64) static const float zeros[kLanes] = {};
  alignas(64) float edge[kLanes][kLanes];
  for (int64_t p = 0; p < positions; p++, pixels += kLanes)
    for (int64_t c = first; c < last; c += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, last - c);
      Vector rows[kLanes];
      if (width == kLanes) {
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; l++) rows[l] = load(pixels[l] < 0 ? zeros : image + pixels[l] + c);
      } else {
        std::memset(edge, 0, sizeof(edge));
        for (int l = 0; l < kLanes; l++)
          if (pixels[l] >= 0) std::memcpy(edge[l], image + pixels[l] + c, width * sizeof(float));
        for (int l = 0; l < kLanes; l++) rows[l] = load(edge[l]);
      }
      transpose(rows);
      Vector* to = out + (c - first) * positions + p;
      if (width == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) to[i * positions] = rows[i];
      } else {
        for (int i = 0; i < width; i++) to[i * positions] = rows[i];
      }
    }
}

inline void pack(const float* data, const Image& image, const Activation& f, const int64_t* pixels, int64_t positions, int64_t first,
                 int64_t last, Vector* out) {
  if (!image.by_lanes) return pack_by_channels(data, pixels, positions, first, last, out);
  f.mean ? pack_by_lanes<true>(data, f, pixels, positions, first, last, out)
         : pack_by_lanes<false>(data, f, pixels, positions, first, last, out);
}

// Writes channels [first, last) of a tile, [channel - first][vectors], to the pixels that it stands for: the same squares, back.
inline void unpack(const Vector* tile, int64_t vectors, const int64_t* pixels, int64_t first, int64_t last, float* image) {
  alignas(64) float edge[kLanes][kLanes];
  for (int64_t p = 0; p < vectors; p++, pixels += kLanes)
    for (int64_t c = first; c < last; c += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, last - c);
      Vector rows[kLanes];
      for (int i = 0; i < kLanes; i++) rows[i] = i < width ? tile[(c - first + i) * vectors + p] : Vector{};
      transpose(rows);
      if (width == kLanes) {
        for (int l = 0; l < kLanes; l++)
          if (pixels[l] >= 0) store(image + pixels[l] + c, rows[l]);
      } else {
        for (int l = 0; l < kLanes; l++) store(edge[l], rows[l]);
        for (int l = 0; l < kLanes; l++)
          if (pixels[l] >= 0) std::memcpy(image + pixels[l] + c, edge[l], width * sizeof(float));
      }
    }
}

}  // namespace sparse_jax
