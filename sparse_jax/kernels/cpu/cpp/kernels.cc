// Convolution (and, as the case of one tap on one pixel, matrix product) with a sparse kernel, in float32; and with a dense one.
//
// The work. Where images lie by channels (NHWC) a lane is a patch: a small rectangle of output pixels of one image; where they lie by
// lanes it is the same patch of another image. A vector of patches, G times, makes a tile, and the window of inputs that it needs is
// packed as [channel][row][column][G] vectors. A tap (dy, dx) is then a constant offset into the window, at every stride and dilation,
// and always aligned: one nonzero costs one broadcast and kTile multiply-adds whose operands are read in order. Packing images by channels
// is a transposition of squares of lanes x channels; by lanes it is a copy, in which they are normalised and rectified too.
//
// The input gradient is the same loop over the transposed kernel: with stride s the input pixels fall into s x s phases, each with the
// taps that reach it. The weight gradient is a dot product of two packed tiles for each nonzero.
//
// The limits. Operations: kTile multiply-adds a nonzero and tile. Bytes: as many operands of the first or the second cache (plan.h says
// which); from memory, each image once for each block of channels, and the halo of its patches.
#include "matrix.h"
#include "pool.h"

namespace sparse_jax {
namespace {

// Parts of the tiles: a fixed number, whoever computes them, so that sums over parts have the same bits with any number of threads.
constexpr int64_t kParts = 32, kGradientParts = 16;

Sums zero_sums(Lease& lease, int64_t channels) {
  Vector* memory = lease.get<Vector>(2 * kParts * channels + 1);
  std::fill(memory, memory + 2 * kParts * channels, Vector{});
  return {memory, memory + kParts * channels, channels};
}

// Both sums of each channel, over parts and lanes in their order: [2][channels].
void write_sums(ffi::ThreadPool& pool, const Sums& sums, float* out) {
  parallel_for(pool, sums.channels, [&](int64_t c) {
    double total = 0, weighted = 0;
    for (int64_t part = 0; part < kParts; part++)
      for (int l = 0; l < kLanes; l++) {
        total += sums.first[part * sums.channels + c][l];
        weighted += sums.second[part * sums.channels + c][l];
      }
    out[c] = float(total);
    out[sums.channels + c] = float(weighted);
  });
}

Image image_of(ffi::Span<const int64_t> sides) {
  if (sides.size() == 4) return {sides[0], sides[1], sides[2], sides[3], false};
  return {sides[0] * kBatch, sides[1], sides[2], sides[3], true};
}

// The attribute is strides, padding before, dilation and block, each in rows (inputs) and columns (outputs); of a compact kernel, whose
// shape does not tell them, the taps follow.
Geometry geometry_of(ffi::Span<const int64_t> kernel, ffi::Span<const int64_t> a) {
  if (a.size() > 8) kernel = {a.begin() + 8, 2};
  return {kernel[0], kernel[1], a[0], a[1], a[2], a[3], a[4], a[5]};
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using Numbers = ffi::Span<const int64_t>;

// A kernel's list; without pointers where the kernel is dense and all of it is used.
List list_of(const S32& index, const S32& pointer, const Image& inputs, const Image& outputs, Numbers numbers, bool transposed) {
  return {index.typed_data(), pointer.typed_data(), int64_t(index.element_count()), int64_t(pointer.element_count()),
          inputs.channels, outputs.channels, numbers[6], numbers[7], transposed, numbers.size() > 8};
}

// A compact kernel has room for the units that are listed.
void check_room(const List& list, const F32& w) {
  const int64_t area = list.block_rows * list.block_columns;
  check(!list.compact || int64_t(w.element_count()) >= list.indices * area, "it has more units than values");
}

// [mean, scale, bias][channels], or nothing.
Activation activation_of(const F32& numbers, int64_t channels) {
  if (numbers.element_count() == 0) return {};
  const float* p = numbers.typed_data();
  return {p, p + channels, p + 2 * channels};
}

Pass forward_pass(const Geometry& g, const Image& from, const Image& to, bool dense) {
  Pass pass{forward_axis(to.height, from.height, g.taps_y, g.stride_y, g.pad_y, g.dilation_y),
            forward_axis(to.width, from.width, g.taps_x, g.stride_x, g.pad_x, g.dilation_x)};
  choose_patch(pass, from, dense);
  return pass;
}

void forward(ffi::ThreadPool& pool, const F32& x, const F32& activation, const F32& w, const S32& index, const S32& pointer,
             const F32& residual, F32& y, F32& statistics, Numbers numbers) {
  const Geometry g = geometry_of(w.dimensions(), numbers);
  const Image from = image_of(x.dimensions()), to = image_of(y.dimensions());
  if (y.element_count() == 0 || x.element_count() == 0 || w.element_count() == 0) {
    std::fill_n(statistics.typed_data(), statistics.element_count(), 0.0f);
    if (residual.element_count()) std::copy_n(residual.typed_data(), y.element_count(), y.typed_data());
    else std::fill_n(y.typed_data(), y.element_count(), 0.0f);
    return;
  }
  const List list = list_of(index, pointer, from, to, numbers, false);
  check_room(list, w);
  const Pass pass = forward_pass(g, from, to, list.dense());
  const int64_t tiles = pass.tiles(from.units());
  const Source source{x.typed_data(), from, activation_of(activation, from.channels)};
  if (is_few_rows(list, pass, g, from, to)) {
    const Places places(pass, from, to, 0);
    return few_rows(pool, list, pass, w.typed_data(), [&](auto rows, auto v) { rows.template forward<v>(source, places, y.typed_data()); });
  }
  if (!from.by_lanes) {
    const Pieces pieces(pool, tiles, tiles, to.channels);
    return product(pool, list, pass, g, w.typed_data(), source, to, pieces, false, Plainly{y.typed_data(), pass.vectors});
  }
  const Pieces pieces(pool, tiles, std::min(tiles, kParts), to.channels);
  const bool wanted = statistics.element_count() > 0;
  Lease lease;
  Vector* memory = lease.get<Vector>(wanted ? 2 * pieces.parts * to.channels : 1);
  const Sums sums{memory, memory + pieces.parts * to.channels, to.channels};
  const float* added = residual.element_count() ? residual.typed_data() : nullptr;
  product(pool, list, pass, g, w.typed_data(), source, to, pieces, false,
          EachChannel<Forward>{{added, y.typed_data(), larger_than_caches(y.typed_data(), y.element_count()), wanted ? &sums : nullptr}});
  if (!wanted) return;
  // How many pixels each part had, the same in every lane.
  std::vector<double> counts(pieces.parts, 0);
  for (int64_t part = 0; part < pieces.parts; part++)
    for (int64_t t = tiles * part / pieces.parts; t < tiles * (part + 1) / pieces.parts; t++)
      counts[part] += double(Places(pass, from, to, t).valid);
  parallel_for(pool, to.channels, [&](int64_t c) {
    double mean = 0, squares = 0, n = 0;
    for (int l = 0; l < kLanes; l++)
      for (int64_t part = 0; part < pieces.parts; part++) {
        const int64_t at = part * to.channels + c;
        if (counts[part] == 0) continue;
        combine<double>(mean, squares, n, sums.first[at][l], sums.second[at][l], counts[part]);
        n += counts[part];
      }
    statistics.typed_data()[c] = float(mean);
    statistics.typed_data()[to.channels + c] = float(n ? squares / n : 0);
  });
}

void input_gradient(ffi::ThreadPool& pool, const F32& dy, const F32& x, const F32& activation, const F32& w, const S32& index,
                    const S32& pointer, F32& dx, F32& gradients, Numbers numbers) {
  const Geometry g = geometry_of(w.dimensions(), numbers);
  const Image from = image_of(dy.dimensions()), to = image_of(dx.dimensions());
  if (dy.element_count() == 0 || dx.element_count() == 0 || w.element_count() == 0) {
    std::fill_n(dx.typed_data(), dx.element_count(), 0.0f);
    std::fill_n(gradients.typed_data(), gradients.element_count(), 0.0f);
    return;
  }
  const List list = list_of(index, pointer, to, from, numbers, true);
  check_room(list, w);
  const Activation f = activation_of(activation, to.channels);
  const Source source{dy.typed_data(), from, {}};
  Lease lease;
  const Sums sums = zero_sums(lease, f.mean ? to.channels : 0);
  for (int64_t py = 0; py < g.stride_y; py++)
    for (int64_t px = 0; px < g.stride_x; px++) {
      Pass pass{backward_axis(to.height, from.height, py, g.taps_y, g.stride_y, g.pad_y, g.dilation_y),
                backward_axis(to.width, from.width, px, g.taps_x, g.stride_x, g.pad_x, g.dilation_x)};
      if (pass.y.count == 0 || pass.x.count == 0) continue;  // a stride beyond the image
      choose_patch(pass, from, list.dense());
      if (is_few_rows(list, pass, g, from, to)) {
        const Places places(pass, from, to, 0);
        few_rows(pool, list, pass, w.typed_data(), [&](auto rows, auto v) { rows.template input_gradient<v>(source, places, dx.typed_data()); });
        continue;
      }
      const int64_t tiles = pass.tiles(from.units());
      const Pieces pieces(pool, tiles, from.by_lanes ? std::min(tiles, kParts) : tiles, to.channels);
      if (from.by_lanes)
        product(pool, list, pass, g, w.typed_data(), source, to, pieces, true,
                EachChannel<Backward>{{x.typed_data(), f, dx.typed_data(), larger_than_caches(dx.typed_data(), dx.element_count()), &sums}});
      else
        product(pool, list, pass, g, w.typed_data(), source, to, pieces, true, Plainly{dx.typed_data(), pass.vectors});
    }
  if (f.mean) write_sums(pool, sums, gradients.typed_data());
}

// The forward product with a frozen kernel. The attribute begins with its taps in rows and columns.
void frozen(ffi::ThreadPool& pool, const F32& x, const F32& values, const S32& index, const S32& pointer, F32& y, Numbers numbers) {
  const Numbers geometry(numbers.begin() + 2, numbers.size() - 2);
  const Geometry g = geometry_of(numbers, geometry);
  const Image from = image_of(x.dimensions()), to = image_of(y.dimensions());
  if (y.element_count() == 0 || x.element_count() == 0 || index.element_count() == 0)
    return void(std::fill_n(y.typed_data(), y.element_count(), 0.0f));
  const FrozenList list{index.typed_data(), pointer.typed_data(), values.typed_data(), int64_t(index.element_count()),
                        int64_t(pointer.element_count()), from.channels, to.channels, geometry[6], geometry[7]};
  check(int64_t(values.element_count()) >= list.indices * list.block_rows * list.block_columns, "it has more units than values");
  check(list.pointers > list.rows(), "it has too few pointers for its outputs");
  if (from.count <= kFewVectors && from.height * from.width * to.height * to.width * g.taps_y * g.taps_x * list.block_rows * list.block_columns == 1)
    return times_vectors(pool, list, x.typed_data(), from.count, y.typed_data());
  const Cut c = cut(pool, list, forward_pass(g, from, to, false), from);
  const Source source{x.typed_data(), from, {}};
  product(c.threads, make_frozen_plan(c.threads, list, c.pass, g, c.block), c.pass, source, to, c.pieces, false, Plainly{y.typed_data(), c.pass.vectors});
}

void pool_maxima(ffi::ThreadPool& pool, const F32& x, const F32& activation, F32& y, Numbers window) {
  const Pool shape{image_of(x.dimensions()), image_of(y.dimensions()), window[0], window[1]};
  shape.check();
  pool_forward(pool, shape, activation_of(activation, shape.from.channels), x.typed_data(), y.typed_data());
}

void pool_gradient(ffi::ThreadPool& pool, const F32& x, const F32& activation, const F32& dy, F32& dx, F32& gradients, Numbers window) {
  const Pool shape{image_of(x.dimensions()), image_of(dy.dimensions()), window[0], window[1]};
  shape.check();
  const Activation f = activation_of(activation, shape.from.channels);
  Lease lease;
  const Sums sums = zero_sums(lease, f.mean ? shape.from.channels : 0);
  pool_backward(pool, shape, f, x.typed_data(), dy.typed_data(), dx.typed_data(), &sums, kParts);
  if (f.mean) write_sums(pool, sums, gradients.typed_data());
}

// All of the kernel: each piece has some input channels and some outputs to itself, and goes through all tiles, so that nothing is summed
// over pieces.
void dense_weight_gradient(ffi::ThreadPool& pool, const Geometry& g, const Pass& pass, const Source& x, const Source& dy, float* dw) {
  const int64_t positions = pass.positions(), tiles = pass.tiles(x.image.units()), taps = g.taps_y * g.taps_x;
  const int64_t inputs = x.image.channels, outputs = dy.image.channels;
  const int64_t block = dense_block(pass, inputs), blocks = (inputs + block - 1) / block;
  const int64_t width = 2 * kPanel, ranges = (outputs + width - 1) / width;
  std::vector<int32_t> offset;
  // Taps that never meet the image have the gradient 0; they are computed at another tap's place.
  auto meets = [&](int64_t t) { return pass.y.tap[t / g.taps_x] >= 0 && pass.x.tap[t % g.taps_x] >= 0; };
  for (int64_t c = 0; c < block; c++)
    for (int64_t t = 0; t < taps; t++) {
      const int64_t place = meets(t) ? pass.y.tap[t / g.taps_x] * pass.window_columns + pass.x.tap[t % g.taps_x] : 0;
      offset.push_back(int32_t(c * positions + place * pass.groups));
    }
  parallel_for(pool, blocks * ranges, [&](int64_t i) {
    const int64_t first = i / ranges * block, length = std::min(block, inputs - first), pairs = length * taps;
    const int64_t low = i % ranges * width, high = std::min(outputs, low + width), panels = (high - low + kPanel - 1) / kPanel;
    Vector* window = window_scratch.get<Vector>(block * positions);
    Vector* gradients = tile_scratch.get<Vector>((high - low) * kTile);
    float* memory = sum_scratch.get<float>(panels * kPanel * (kTile * kLanes + pairs));
    float* sums = memory + panels * kPanel * kTile * kLanes;  // [panel][pair][kPanel]
    if (tiles == 0) std::fill(sums, sums + panels * kPanel * pairs, 0.0f);
    for (int64_t t = 0; t < tiles; t++) {
      const Places places(pass, x.image, dy.image, t);
      pack(dy.data, dy.image, dy.activation, places.destination, kTile, low, high, gradients);
      transpose_outputs(gradients, high - low, memory);
      pack(x.data, x.image, x.activation, places.source, positions, first, first + length, window);
      dispatch<false>(pass, [&](auto rows, auto columns, auto s, auto) {
        for (int64_t panel = 0; panel < panels; panel++)
          for (int64_t k = 0; k < pairs; k += kPairs)
            dense_dot<rows, columns, s>(window, row_stride(pass), pass.x.stride, &offset[k], int(std::min<int64_t>(kPairs, pairs - k)),
                                        memory + panel * kTile * kLanes * kPanel, t == 0, sums + (panel * pairs + k) * kPanel);
      });
    }
    for (int64_t k = 0; k < pairs; k++)
      for (int64_t o = low; o < high; o++) {
        const float sum = sums[((o - low) / kPanel * pairs + k) * kPanel + (o - low) % kPanel];
        dw[(k % taps * inputs + first + k / taps) * outputs + o] = meets(k % taps) ? sum : 0.0f;
      }
  });
}

void weight_gradient(ffi::ThreadPool& pool, const F32& x, const F32& activation, const F32& dy, const S32& index, const S32& pointer,
                     F32& dw, Numbers numbers) {
  const Geometry g = geometry_of(dw.dimensions(), numbers);
  if (x.element_count() == 0 || dy.element_count() == 0 || dw.element_count() == 0)
    return void(std::fill_n(dw.typed_data(), dw.element_count(), 0.0f));
  const Source source{x.typed_data(), image_of(x.dimensions()), activation_of(activation, image_of(x.dimensions()).channels)};
  const Source gradient{dy.typed_data(), image_of(dy.dimensions()), {}};
  const Image &from = source.image, &to = gradient.image;
  const List list = list_of(index, pointer, from, to, numbers, false);
  check_room(list, dw);
  const Pass pass = forward_pass(g, from, to, list.dense());
  if (list.dense()) return dense_weight_gradient(pool, g, pass, source, gradient, dw.typed_data());
  if (is_few_rows(list, pass, g, from, to)) {
    const Places places(pass, from, to, 0);
    few_rows(pool, list, pass, nullptr, [&](auto rows, auto v) { rows.template weight_gradient<v>(source, gradient, places, dw.typed_data()); });
    if (list.compact) std::fill(dw.typed_data() + list.pointer[list.inputs], dw.typed_data() + dw.element_count(), 0.0f);
    return;
  }
  const int64_t positions = pass.positions(), tiles = pass.tiles(from.units()), parts = std::min(tiles, kGradientParts);
  const Pieces pieces(pool, tiles, parts, to.channels);
  Lease plan_scratch, partial_scratch;
  const Plan plan = make_plan(pool, list, pass, g, nullptr, plan_scratch);
  const int64_t nonzeros = plan.start.back();
  float* partial = partial_scratch.get<float>(parts * nonzeros);
  parallel_for(pool, pieces.count(), [&](int64_t i) {
    const int64_t first = pieces.first(i), last = pieces.last(i);
    float* mine = partial + pieces.part(i) * nonzeros;
    for (int64_t b = 0; b < plan.blocks; b++) std::fill(mine + plan.start[b * plan.rows + first], mine + plan.start[b * plan.rows + last], 0.0f);
    Vector* window = window_scratch.get<Vector>(plan.block * positions);
    Vector* gradients = tile_scratch.get<Vector>((last - first) * pass.vectors);
    Vector* waiting = waiting_scratch.get<Vector>(plan.block * g.taps_y * g.taps_x + kLanes);
    for (int64_t t = pieces.first_tile(i); t < pieces.last_tile(i); t++) {
      const Places places(pass, from, to, t);
      pack(gradient.data, to, {}, places.destination, pass.vectors, first, last, gradients);
      dispatch<true>(pass, [&](auto rows, auto columns, auto s, auto vectors) {
        for (int64_t b = 0; b < plan.blocks; b++) {
          pack(source.data, from, source.activation, places.source, positions, b * plan.block,
               std::min(from.channels, (b + 1) * plan.block), window);
          Ahead ahead(source, pass, places.source, (b + 1) * plan.block, std::min(from.channels, (b + 2) * plan.block), last - first);
          float* to = mine + plan.start[b * plan.rows + first];
          int64_t count = 0;
          for (int64_t r = first; r < last; r++, ahead.some()) {
            const Vector* gradient = gradients + (r - first) * pass.vectors;
            Vector* behind = dot<rows, columns, s, vectors>(window, row_stride(pass), pass.x.stride, plan.begin(b, r), plan.end(b, r), gradient,
                                                   waiting + count);
            count = reduce(waiting, behind - waiting, r + 1 == last, to);
          }
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

// No exception may leave a handler.
template <typename F>
ffi::Error guarded(F body) {
  try {
    body();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "sparse_jax: no memory for the kernel's scratch");
  } catch (const std::invalid_argument& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, error.what());
  }
  return ffi::Error::Success();
}

ffi::Error ForwardHandler(ffi::ThreadPool pool, F32 x, F32 activation, F32 w, S32 index, S32 pointer, F32 residual, ffi::Result<F32> y,
                          ffi::Result<F32> statistics, Numbers numbers) {
  return guarded([&] { forward(pool, x, activation, w, index, pointer, residual, *y, *statistics, numbers); });
}

ffi::Error InputGradientHandler(ffi::ThreadPool pool, F32 dy, F32 x, F32 activation, F32 w, S32 index, S32 pointer, ffi::Result<F32> dx,
                                ffi::Result<F32> gradients, Numbers numbers) {
  return guarded([&] { input_gradient(pool, dy, x, activation, w, index, pointer, *dx, *gradients, numbers); });
}

ffi::Error WeightGradientHandler(ffi::ThreadPool pool, F32 x, F32 activation, F32 dy, S32 index, S32 pointer, ffi::Result<F32> dw,
                                 Numbers numbers) {
  return guarded([&] { weight_gradient(pool, x, activation, dy, index, pointer, *dw, numbers); });
}

ffi::Error FrozenHandler(ffi::ThreadPool pool, F32 x, F32 values, S32 index, S32 pointer, ffi::Result<F32> y, Numbers numbers) {
  return guarded([&] { frozen(pool, x, values, index, pointer, *y, numbers); });
}

ffi::Error PoolHandler(ffi::ThreadPool pool, F32 x, F32 activation, ffi::Result<F32> y, Numbers window) {
  return guarded([&] { pool_maxima(pool, x, activation, *y, window); });
}

ffi::Error PoolGradientHandler(ffi::ThreadPool pool, F32 x, F32 activation, F32 dy, ffi::Result<F32> dx, ffi::Result<F32> gradients,
                               Numbers window) {
  return guarded([&] { pool_gradient(pool, x, activation, dy, *dx, *gradients, window); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_jax_forward, ForwardHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<S32>().Arg<S32>().Arg<F32>()
                                  .Ret<F32>().Ret<F32>().Attr<Numbers>("geometry"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_jax_input_gradient, InputGradientHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<S32>().Arg<S32>()
                                  .Ret<F32>().Ret<F32>().Attr<Numbers>("geometry"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_jax_weight_gradient, WeightGradientHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<S32>().Arg<S32>()
                                  .Ret<F32>().Attr<Numbers>("geometry"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_jax_frozen, FrozenHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<S32>().Arg<S32>().Ret<F32>()
                                  .Attr<Numbers>("geometry"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_jax_pool, PoolHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>().Attr<Numbers>("window"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_jax_pool_gradient, PoolGradientHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>()
                                  .Attr<Numbers>("window"));

}  // namespace sparse_jax
