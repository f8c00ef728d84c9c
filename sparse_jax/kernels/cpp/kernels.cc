// Convolution (and, as the case of one tap on one pixel, matrix product) with a sparse kernel, in float32.
//
// The work. A lane is a patch: a small rectangle of output pixels of one image. kLanes patches, G times, make a tile, and the window
// of inputs that they need is packed as [channel][row][column][G] vectors of lanes. A tap (dy, dx) is then a constant offset into
// the window, at every stride and dilation, and always aligned: one nonzero costs one broadcast and kTile multiply-adds whose operands
// are read in order. Images enter and leave as they are, NHWC; packing is a transposition of squares of lanes x channels.
//
// The input gradient is the same loop over the transposed list: with stride s the input pixels fall into s x s phases, each with the
// taps that reach it. The weight gradient is a dot product of two packed tiles for each nonzero.
//
// The limits. Operations: kTile multiply-adds a nonzero and tile. Bytes: as many operands of the first or the second cache (plan.h says
// which); from memory, each image once for each block of channels, and the halo of its patches.
#include "plan.h"
#include "tiles.h"
#include "vectors.h"

namespace sparse_jax {
namespace {

// The next row of a window. Hiding the sum from the compiler keeps one addition a row: otherwise it works out each operand's address anew.
inline const Vector* next(const Vector* x, int64_t row_stride) {
  x += row_stride;
  asm("" : "+r"(x));
  return x;
}

// All nonzeros of one destination channel and one block. The kTile sums stay in registers, so that a nonzero reads its operands and
// writes nothing. S: stride in columns, 0 where it is known at run time only.
template <int ROWS, int COLUMNS, int S>
inline void accumulate(const Vector* window, int64_t row_stride, int64_t stride, const Entry* e, const Entry* end, bool first, Vector* out) {
  constexpr int G = kTile / (ROWS * COLUMNS);
  const int64_t s = S ? S : stride;
  Vector sum[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i++) sum[i] = first ? Vector{} : out[i];
  for (; e != end; e++) {
    const Vector* x = window + e->offset;
    const Vector w = broadcast(e->value);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++, x = next(x, row_stride))
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; c++)
#pragma GCC unroll 16
        for (int g = 0; g < G; g++) sum[(r * COLUMNS + c) * G + g] += w * x[c * s * G + g];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i++) out[i] = sum[i];
}

// Sums over lanes: vectors wait until there are kLanes of them, then one transposition reduces them all, at three instructions each
// where one by one they would cost a dozen.
class LaneSums {
 public:
  explicit LaneSums(float* to) : to_(to) {}

  void add(Vector v) {
    waiting_[have_++] = v;
    if (have_ == kLanes) flush();
  }

  void flush() {
    Vector rows[kLanes];
#pragma GCC unroll 16
    for (int k = 0; k < kLanes; k++) rows[k] = k < have_ ? waiting_[k] : Vector{};
    transpose(rows);
#pragma GCC unroll 4
    for (int h = kLanes / 2; h; h /= 2)
#pragma GCC unroll 16
      for (int k = 0; k < h; k++) rows[k] += rows[k + h];
    if (have_ == kLanes)
      store(to_, load(to_) + rows[0]);
    else
      for (int k = 0; k < have_; k++) to_[k] += rows[0][k];
    to_ += have_;
    have_ = 0;
  }

 private:
  Vector waiting_[kLanes];
  int have_ = 0;
  float* to_;
};

// Dot products of a tile's output gradients (in registers) with its window, one for each nonzero of an output. Four partial sums: one
// alone would wait for the latency of each addition.
template <int ROWS, int COLUMNS, int S>
inline void dot(const Vector* window, int64_t row_stride, int64_t stride, const Entry* e, const Entry* end, const Vector* dy, LaneSums& sums) {
  constexpr int G = kTile / (ROWS * COLUMNS);
  const int64_t s = S ? S : stride;
  Vector y[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i++) y[i] = dy[i];
  for (; e != end; e++) {
    const Vector* x = window + e->offset;
    Vector part[4] = {};
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++, x = next(x, row_stride))
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; c++)
#pragma GCC unroll 16
        for (int g = 0; g < G; g++) {
          const int i = (r * COLUMNS + c) * G + g;
          part[i % 4] += y[i] * x[c * s * G + g];
        }
    sums.add((part[0] + part[1]) + (part[2] + part[3]));
  }
}

// Calls f with the patch's sides and the stride as compile-time numbers, so that the loops above unroll into registers.
template <typename F>
void dispatch(const Pass& pass, F f) {
  auto with_stride = [&](auto rows, auto columns) {
    if (pass.x.stride == 1) return f(rows, columns, std::integral_constant<int, 1>{});
    if (pass.x.stride == 2) return f(rows, columns, std::integral_constant<int, 2>{});
    return f(rows, columns, std::integral_constant<int, 0>{});
  };
  constexpr int side = kTile == 16 ? 4 : 2;
  if (pass.patch_rows == 1) return with_stride(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
  if (pass.patch_columns == 2) return with_stride(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
  return with_stride(std::integral_constant<int, side>{}, std::integral_constant<int, kTile / side>{});
}

// Of each thread.
thread_local Scratch window_scratch, tile_scratch, pixel_scratch, place_scratch;

// Work in pieces: tiles (or parts of them) times ranges of destination channels. Where there are fewer tiles than keep all threads busy,
// channels are divided too, and each range packs the window again. No sum reaches over channels, so this changes no bit.
struct Pieces {
  int64_t tiles, ranges, width, rows;

  Pieces(const ffi::ThreadPool& pool, int64_t tiles, int64_t rows) : tiles(tiles), rows(rows) {
    const int64_t wanted = tiles >= 2 * pool.num_threads() ? 1 : (pool.num_threads() + tiles - 1) / tiles;
    width = std::max<int64_t>(2 * kLanes, (rows + wanted * kLanes - 1) / (wanted * kLanes) * kLanes);
    ranges = (rows + width - 1) / width;
  }
  int64_t count() const { return tiles * ranges; }
  int64_t tile(int64_t i) const { return i / ranges; }
  int64_t first(int64_t i) const { return i % ranges * width; }
  int64_t last(int64_t i) const { return std::min(rows, first(i) + width); }
};

// Destination = kernel applied to source: the forward product, or a phase of the transposed one.
void product(ffi::ThreadPool& pool, const List& list, const Pass& pass, const Geometry& g, const float* w, const float* source,
             const Image& from, float* destination, const Image& to) {
  if (pass.y.count <= 0 || pass.x.count <= 0 || from.count == 0) return;
  Lease plan_scratch;
  const Plan plan = make_plan(pool, list, pass, g, w, plan_scratch);
  const int64_t positions = pass.positions();
  const Pieces pieces(pool, pass.tiles(from.count), plan.rows);
  parallel_for(pool, pieces.count(), [&](int64_t i) {
    const Tile tile(pass, from.count, pieces.tile(i));
    const int64_t first = pieces.first(i), last = pieces.last(i);
    int64_t* pixels = pixel_scratch.get<int64_t>(positions * kLanes);
    int64_t* places = place_scratch.get<int64_t>(kTile * kLanes);
    tile.sources(pass, from, pixels);
    tile.destinations(pass, to, places);
    Vector* window = window_scratch.get<Vector>(plan.block * positions);
    Vector* sums = tile_scratch.get<Vector>((last - first) * kTile);
    dispatch(pass, [&](auto rows, auto columns, auto stride) {
      const int64_t row_stride = pass.y.stride * pass.window_columns * pass.groups;
      for (int64_t b = 0; b < plan.blocks; b++) {
        pack(source, pixels, positions, b * plan.block, std::min(from.channels, (b + 1) * plan.block), window);
        for (int64_t r = first; r < last; r++)
          if (b == 0 || plan.begin(b, r) != plan.end(b, r))
            accumulate<rows, columns, stride>(window, row_stride, pass.x.stride, plan.begin(b, r), plan.end(b, r), b == 0,
                                              sums + (r - first) * kTile);
      }
    });
    unpack(sums, places, first, last, destination);
  });
}

Image image_of(ffi::Span<const int64_t> sides) { return {sides[0], sides[1], sides[2], sides[3]}; }

// The attribute is strides, padding before, dilation and block, each in rows (inputs) and columns (outputs).
Geometry geometry_of(ffi::Span<const int64_t> kernel, ffi::Span<const int64_t> a) {
  return {kernel[0], kernel[1], a[0], a[1], a[2], a[3], a[4], a[5]};
}

Pass forward_pass(const Geometry& g, const Image& from, const Image& to) {
  Pass pass{forward_axis(to.height, g.taps_y, g.stride_y, g.pad_y, g.dilation_y),
            forward_axis(to.width, g.taps_x, g.stride_x, g.pad_x, g.dilation_x)};
  choose_patch(pass, from.count);
  return pass;
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using Numbers = ffi::Span<const int64_t>;

void Forward(ffi::ThreadPool& pool, const F32& x, const F32& w, const S32& index, const S32& pointer, F32& y, Numbers numbers) {
  const Geometry g = geometry_of(w.dimensions(), numbers);
  const Image from = image_of(x.dimensions()), to = image_of(y.dimensions());
  const List list{index.typed_data(), pointer.typed_data(), from.channels, to.channels, numbers[6], numbers[7], false};
  product(pool, list, forward_pass(g, from, to), g, w.typed_data(), x.typed_data(), from, y.typed_data(), to);
}

void InputGradient(ffi::ThreadPool& pool, const F32& dy, const F32& w, const S32& index, const S32& pointer, F32& dx, Numbers numbers) {
  const Geometry g = geometry_of(w.dimensions(), numbers);
  const Image from = image_of(dy.dimensions()), to = image_of(dx.dimensions());
  const List list{index.typed_data(), pointer.typed_data(), to.channels, from.channels, numbers[6], numbers[7], true};
  for (int64_t py = 0; py < g.stride_y; py++)
    for (int64_t px = 0; px < g.stride_x; px++) {
      Pass pass{backward_axis(to.height, py, g.taps_y, g.stride_y, g.pad_y, g.dilation_y),
                backward_axis(to.width, px, g.taps_x, g.stride_x, g.pad_x, g.dilation_x)};
      choose_patch(pass, from.count);
      product(pool, list, pass, g, w.typed_data(), dy.typed_data(), from, dx.typed_data(), to);
    }
}

void WeightGradient(ffi::ThreadPool& pool, const F32& x, const F32& dy, const S32& index, const S32& pointer, F32& dw, Numbers numbers) {
  const Geometry g = geometry_of(dw.dimensions(), numbers);
  const Image from = image_of(x.dimensions()), to = image_of(dy.dimensions());
  const List list{index.typed_data(), pointer.typed_data(), from.channels, to.channels, numbers[6], numbers[7], false};
  const Pass pass = forward_pass(g, from, to);
  Lease plan_scratch, partial_scratch;
  const Plan plan = make_plan(pool, list, pass, g, nullptr, plan_scratch);
  const int64_t positions = pass.positions(), nonzeros = plan.start.back(), tiles = pass.tiles(from.count);
  // Sums of a fixed number of parts, whoever computes them: the same bits with any number of threads.
  const int64_t parts = std::min<int64_t>(tiles, 16);
  float* partial = partial_scratch.get<float>(parts * nonzeros);
  const Pieces pieces(pool, parts, plan.rows);
  parallel_for(pool, pieces.count(), [&](int64_t i) {
    const int64_t part = pieces.tile(i), first = pieces.first(i), last = pieces.last(i);
    float* mine = partial + part * nonzeros;
    for (int64_t b = 0; b < plan.blocks; b++) std::fill(mine + plan.start[b * plan.rows + first], mine + plan.start[b * plan.rows + last], 0.0f);
    int64_t* pixels = pixel_scratch.get<int64_t>(positions * kLanes);
    int64_t* places = place_scratch.get<int64_t>(kTile * kLanes);
    Vector* window = window_scratch.get<Vector>(plan.block * positions);
    Vector* gradients = tile_scratch.get<Vector>((last - first) * kTile);
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; t++) {
      const Tile tile(pass, from.count, t);
      tile.sources(pass, from, pixels);
      tile.destinations(pass, to, places);
      pack(dy.typed_data(), places, kTile, first, last, gradients);
      dispatch(pass, [&](auto rows, auto columns, auto stride) {
        const int64_t row_stride = pass.y.stride * pass.window_columns * pass.groups;
        for (int64_t b = 0; b < plan.blocks; b++) {
          pack(x.typed_data(), pixels, positions, b * plan.block, std::min(from.channels, (b + 1) * plan.block), window);
          LaneSums sums(mine + plan.start[b * plan.rows + first]);
          for (int64_t r = first; r < last; r++)
            if (plan.begin(b, r) != plan.end(b, r))
              dot<rows, columns, stride>(window, row_stride, pass.x.stride, plan.begin(b, r), plan.end(b, r),
                                         gradients + (r - first) * kTile, sums);
          sums.flush();
        }
      });
    }
  });
  // Zeros first, then the sums to their places, both in pieces: the dense array is far larger than the sums.
  float* out = dw.typed_data();
  const int64_t size = dw.element_count(), shares = 16;
  parallel_for(pool, shares, [&](int64_t i) { std::fill(out + size * i / shares, out + size * (i + 1) / shares, 0.0f); });
  parallel_for(pool, shares, [&](int64_t i) {
    for (int64_t k = nonzeros * i / shares; k < nonzeros * (i + 1) / shares; k++) {
      float sum = 0;
      for (int64_t part = 0; part < parts; part++) sum += partial[part * nonzeros + k];
      out[plan.entries[k].index] = sum;
    }
  });
}

using Body = void (*)(ffi::ThreadPool&, const F32&, const F32&, const S32&, const S32&, F32&, Numbers);

// No exception may leave a handler.
template <Body body>
ffi::Error handle(ffi::ThreadPool pool, F32 a, F32 b, S32 index, S32 pointer, ffi::Result<F32> out, Numbers numbers) {
  try {
    body(pool, a, b, index, pointer, *out, numbers);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "sparse_jax: no memory for the kernel's scratch");
  }
  return ffi::Error::Success();
}

}  // namespace

#define SPARSE_JAX_HANDLER(name, function)                   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function,              \
                                ffi::Ffi::Bind()             \
                                    .Ctx<ffi::ThreadPool>()  \
                                    .Arg<F32>()              \
                                    .Arg<F32>()              \
                                    .Arg<S32>()              \
                                    .Arg<S32>()              \
                                    .Ret<F32>()              \
                                    .Attr<Numbers>("geometry"))

SPARSE_JAX_HANDLER(sparse_jax_forward, handle<Forward>);
SPARSE_JAX_HANDLER(sparse_jax_input_gradient, handle<InputGradient>);
SPARSE_JAX_HANDLER(sparse_jax_weight_gradient, handle<WeightGradient>);

}  // namespace sparse_jax
