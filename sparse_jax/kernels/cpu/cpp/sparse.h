// The inner loops: one destination channel's nonzeros in one block, over a tile.
#pragma once

#include "plan.h"

namespace sparse_jax {

// The next row of a window. Hiding the sum from the compiler keeps one addition a row: otherwise it works out each operand's address anew.
inline const Vector* next(const Vector* x, int64_t row_stride) {
  x += row_stride;
  asm("" : "+r"(x));
  return x;
}

// All nonzeros of one destination channel and one block, of a range [e, end) of a plan's or of a frozen list. The sums of the tile's V vectors
// stay in registers, so that a nonzero reads its operands and writes nothing. S: stride in columns, 0 where it is known at run time only.
template <int ROWS, int COLUMNS, int S, int V, typename E>
inline void accumulate(const Vector* window, int64_t row_stride, int64_t stride, E e, E end, bool first, Vector* out) {
  constexpr int G = V / (ROWS * COLUMNS);
  const int64_t s = S ? S : stride;
  if constexpr (V < 8 && V < kTile) {  // several nonzeros at once, as an addition waits for the one before
    constexpr int kChains = V == 1 ? 4 : 8 / V;
    Vector sum[kChains][V];
#pragma GCC unroll 16
    for (int k = 0; k < kChains; k++)
#pragma GCC unroll 16
      for (int i = 0; i < V; i++) sum[k][i] = first || k ? Vector{} : out[i];
    auto add = [&](int k) __attribute__((always_inline)) {
      const Vector* x = window + e.offset(k);
      if (ROWS > 1) asm("" : "+r"(x));  // else each operand's address is worked out anew
#pragma GCC unroll 16
      for (int i = 0; i < V; i++) sum[k][i] += broadcast(e.value(k)) * x[i / G / COLUMNS * row_stride + i / G % COLUMNS * s * G + i % G];
    };
    for (; end - e >= kChains; e += kChains)
#pragma GCC unroll 16
      for (int k = 0; k < kChains; k++) add(k);
    for (; end - e > 0; e += 1) add(0);
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) {
#pragma GCC unroll 16
      for (int k = 1; k < kChains; k++) sum[0][i] += sum[k][i];
      out[i] = sum[0][i];
    }
    return;
  }
  Vector sum[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; i++) sum[i] = first ? Vector{} : out[i];
  for (; end - e > 0; e += 1) {
    const Vector* x = window + e.offset(0);
    const Vector w = broadcast(e.value(0));
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++, x = next(x, row_stride))
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; c++)
#pragma GCC unroll 16
        for (int g = 0; g < G; g++) sum[(r * COLUMNS + c) * G + g] += w * x[c * s * G + g];
  }
#pragma GCC unroll 16
  for (int i = 0; i < V; i++) out[i] = sum[i];
}

// Each vector's sum over its lanes: lane l of the result is that of vector l. Of two vectors that are H apart, the lanes without the bit H
// and those with it are added up into one; after the steps 1, 2, 4, ... one vector is left: 30 shuffles for 16 vectors, where a
// transposition takes 64.
template <int H = 1>
inline Vector lane_sums(Vector (&v)[kLanes]) {
  if constexpr (H < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * H) {
      exchange<H>(v[i], v[i + H], std::make_integer_sequence<int, kLanes>{});
      v[i] += v[i + H];
    }
    return lane_sums<2 * H>(v);
  } else {
    return v[0];
  }
}

// Adds the lane sums of waiting vectors to a list of numbers, kLanes at a time; what is left over goes to the front. All of them if so told.
inline int64_t reduce(Vector* waiting, int64_t count, bool all, float*& to) {
  int64_t done = 0;
  for (; done + kLanes <= count || (all && done < count); done += kLanes) {
    Vector v[kLanes];
    const int64_t have = std::min<int64_t>(kLanes, count - done);
#pragma GCC unroll 16
    for (int k = 0; k < kLanes; k++) v[k] = k < have ? waiting[done + k] : Vector{};
    const Vector sums = lane_sums(v);
    if (have == kLanes)
      store(to, load(to) + sums);
    else
      for (int k = 0; k < have; k++) to[k] += sums[k];
    to += have;
  }
  for (int64_t k = done; k < count; k++) waiting[k - done] = waiting[k];
  return std::max<int64_t>(0, count - done);
}

// Dot products, lane by lane, of a tile's output gradients (in registers) with its window, one vector for each nonzero of an output. They
// are summed over lanes elsewhere: the constants of that would drive the gradients out of the registers.
template <int ROWS, int COLUMNS, int S, int V>
inline Vector* dot(const Vector* window, int64_t row_stride, int64_t stride, const Entry* e, const Entry* end, const Vector* dy, Vector* to) {
  constexpr int G = V / (ROWS * COLUMNS);
  const int64_t s = S ? S : stride;
  Vector y[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; i++) y[i] = dy[i];
  for (; e != end; e++) {
    const Vector* x = window + e->offset;
    Vector part[2] = {};
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++, x = next(x, row_stride))
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; c++)
#pragma GCC unroll 16
        for (int g = 0; g < G; g++) {
          const int i = (r * COLUMNS + c) * G + g;
          part[i % 2] = i < 2 ? y[i] * x[c * s * G + g] : part[i % 2] + y[i] * x[c * s * G + g];
        }
    *to++ = part[0] + part[1];
  }
  return to;
}

template <int N>
inline constexpr std::integral_constant<int, N> number{};

// Calls f with the patch's sides, the stride and the tile's vectors as compile-time numbers, so that the loops above unroll into registers.
// SMALL: whether there are tiles of fewer vectors than kTile.
template <bool SMALL, typename F>
inline void dispatch(const Pass& pass, F f) {
  auto with_stride = [&](auto rows, auto columns) {
    if (pass.x.stride == 1) return f(rows, columns, number<1>, number<kTile>);
    if (pass.x.stride == 2) return f(rows, columns, number<2>, number<kTile>);
    return f(rows, columns, number<0>, number<kTile>);
  };
  constexpr int side = kTile == 16 ? 4 : 2;
  if constexpr (SMALL) {  // a stride makes no difference to single pixels
    if (pass.vectors < kTile && pass.patch_rows == 2) return f(number<2>, number<2>, number<0>, number<4>);
    switch (pass.vectors == kTile ? 0 : pass.vectors) {
      case 1: return f(number<1>, number<1>, number<1>, number<1>);
      case 2: return f(number<1>, number<1>, number<1>, number<2>);
      case 4: return f(number<1>, number<1>, number<1>, number<4>);
      case 8: return f(number<1>, number<1>, number<1>, number<8>);
    }
  }
  if (pass.patch_rows == 1) return with_stride(number<1>, number<1>);
  if (pass.patch_columns == 2) return with_stride(number<2>, number<2>);
  return with_stride(number<side>, number<kTile / side>);
}

}  // namespace sparse_jax
