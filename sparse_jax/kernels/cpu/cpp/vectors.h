// Vectors as wide as the target's registers, their transposition, memory that outlives a call, and loops over XLA's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace sparse_jax {

namespace ffi = xla::ffi;

// kTile accumulators of kLanes floats, an operand and a broadcast weight must fit into the registers: 32 of them with AVX-512 and
// on Arm, 16 on the rest of x86.
#if defined(__AVX512F__)
inline constexpr int kLanes = 16, kTile = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8, kTile = 8;
#elif defined(__aarch64__)
inline constexpr int kLanes = 4, kTile = 16;
#else
inline constexpr int kLanes = 4, kTile = 8;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Indices __attribute__((vector_size(4 * kLanes)));

inline Vector broadcast(float value) { return value - Vector{}; }
inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

// Of each lane p[index], where no index reaches beyond `last`: a larger one reads that.
inline Vector gather(const float* p, const int32_t* index, int32_t last) {
#if defined(__AVX512F__)
  const __m512i at = _mm512_min_epu32(_mm512_loadu_si512(index), _mm512_set1_epi32(last));
  return reinterpret_cast<Vector>(_mm512_i32gather_ps(at, p, 4));
#elif defined(__AVX2__)
  const __m256i at = _mm256_min_epu32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), _mm256_set1_epi32(last));
  return reinterpret_cast<Vector>(_mm256_i32gather_ps(p, at, 4));
#else
  Vector v;
  for (int l = 0; l < kLanes; l++) v[l] = p[std::min(uint32_t(index[l]), uint32_t(last))];
  return v;
#endif
}

// Past the caches: what is written is larger than they are, and a line need not be read before it is written whole.
inline void store_past_caches(float* p, Vector v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#else
  store(p, v);
#endif
}
// Before another thread may read what was stored so.
inline void fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}
inline bool larger_than_caches(const float* p, int64_t count) {
  return count * sizeof(float) >= (size_t(8) << 20) && reinterpret_cast<uintptr_t>(p) % sizeof(Vector) == 0;
}

// One step of a butterfly: of each pair of rows that are H apart, the second halves of the first change place with the first
// halves of the second. After the steps 1, 2, 4, ... the square is transposed.
template <int H, int... I>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  const Vector low = __builtin_shufflevector(a, b, (I & H ? kLanes + I - H : I)...);
  const Vector high = __builtin_shufflevector(a, b, (I & H ? kLanes + I : I + H)...);
#else
  const Vector low = __builtin_shuffle(a, b, Indices{(I & H ? kLanes + I - H : I)...});
  const Vector high = __builtin_shuffle(a, b, Indices{(I & H ? kLanes + I : I + H)...});
#endif
  a = low;
  b = high;
}

template <int H = 1>
inline void transpose(Vector (&rows)[kLanes]) {
  if constexpr (H < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++)
      if (!(i & H)) exchange<H>(rows[i], rows[i + H], std::make_integer_sequence<int, kLanes>{});
    transpose<2 * H>(rows);
  }
}

// Memory for one purpose, kept between calls, since fresh pages cost more than a small layer's work.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <typename T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// A Scratch for the time of one call: there are as many as calls were ever at work at once, whichever threads made them.
class Lease {
 public:
  Lease() {
    std::lock_guard<std::mutex> lock(mutex());
    if (free().empty()) {
      scratch_ = std::make_unique<Scratch>();
    } else {
      scratch_ = std::move(free().back());
      free().pop_back();
    }
  }
  ~Lease() {
    std::lock_guard<std::mutex> lock(mutex());
    free().push_back(std::move(scratch_));
  }
  template <typename T>
  T* get(size_t count) {
    return scratch_->get<T>(count);
  }

 private:
  // Never destroyed: XLA's threads may outlive the program's statics.
  static std::mutex& mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
  }
  static std::vector<std::unique_ptr<Scratch>>& free() {
    static auto* free = new std::vector<std::unique_ptr<Scratch>>;
    return *free;
  }
  std::unique_ptr<Scratch> scratch_;
};

// XLA's threads, or some of them: for what takes no longer than it takes to wake them up, one is best.
struct Threads {
  ffi::ThreadPool& pool;
  int64_t most;

  Threads(ffi::ThreadPool& pool, int64_t most = INT64_MAX) : pool(pool), most(most) {}
  int64_t num_threads() const { return std::min<int64_t>(most, pool.num_threads()); }
};

// Calls work(i) for each i below count, on XLA's threads and this one. Which thread takes which i is left to chance, so what is
// computed must not depend on it. It waits for the work, not for the helpers: where all threads are busy with calls like this one
// none of them would ever start, and this thread does all by itself.
inline void parallel_for(const Threads& pool, int64_t count, const std::function<void(int64_t)>& work) {
  struct State {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::exception_ptr error;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  const int64_t helpers = std::min<int64_t>(count, pool.num_threads()) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; i++) work(i);
    return;
  }
  auto state = std::make_shared<State>();
  const auto* f = &work;  // read only after an i was drawn, which keeps this call waiting
  auto run = [state, f, count] {
    int64_t mine = 0;
    std::exception_ptr error;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; mine++) try {
        (*f)(i);
      } catch (...) {
        error = std::current_exception();
      }
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(state->mutex);
    if (error) state->error = error;
    state->done += mine;
    if (state->done == count) state->all_done.notify_all();
  };
  for (int64_t i = 0; i < helpers; i++) pool.pool.Schedule([run] { run(); });
  run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == count; });
  if (state->error) std::rethrow_exception(state->error);
}

}  // namespace sparse_jax
