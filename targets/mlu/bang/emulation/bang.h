// The BANG C intrinsics that our kernels use, as plain C++11 for the host: same names, same arguments, strict checks.
//
// cncc has its own <bang.h> and never sees this one. What is checked at every call: each on-chip operand lies inside
// one declared array, starts at a multiple of 128 bytes where the vector unit needs it, does not half overlap the
// result; counts are multiples of 64; a copy goes where its direction says; all arrays together fit the capacity.
// A broken rule names intrinsic, file, line and limit. Inside `launch` it ends the launch and is returned as text,
// outside it goes to stderr and aborts. Not checked: scalar reads and writes of on-chip arrays, and GDRAM bounds.
#ifndef DSV4C_BANG_EMULATION_H
#define DSV4C_BANG_EMULATION_H

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#ifndef NRAM_BYTES
#error "NRAM_BYTES, the on-chip bytes a kernel may use, must be defined"
#endif
#ifndef WRAM_BYTES
#error "WRAM_BYTES, the bytes of the weight memory, must be defined"
#endif

#define __nram__ static
#define __wram__ static
#define __mlu_func__ static inline
#define __mlu_entry__ static
#define BANG_REGISTER(memory, name) static const bang::Registered registered_##name(memory, #name, name, sizeof(name))
#define BANG_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define BANG_HERE bang::Place{__func__, file, line}

enum mluMemcpyDirection_t { GDRAM2NRAM, NRAM2GDRAM, NRAM2NRAM, NRAM2WRAM };

namespace bang {

enum { IN_NRAM, IN_WRAM };
enum { ALIGNMENT = 128, COUNT = 64, FILTERS = 64, FILTER_BYTES = 64 };

struct Place {
  const char *intrinsic, *file;
  int line;
};

struct Stop {
  std::string message;
};

struct Region {
  int memory;
  const char *name;
  char *begin;
  long bytes;
};

inline std::vector<Region> &regions() {
  static std::vector<Region> all;
  return all;
}

inline bool &launched() {
  static bool inside = false;
  return inside;
}

struct Registered {
  Registered(int memory, const char *name, void *begin, size_t bytes) {
    regions().push_back(Region{memory, name, static_cast<char *>(begin), static_cast<long>(bytes)});
  }
};

inline std::string text(long number) { return std::to_string(static_cast<long long>(number)); }

[[noreturn]] inline void stop(const std::string &message) {
  if (launched()) throw Stop{message};
  std::fprintf(stderr, "%s\n", message.c_str());
  std::abort();
}

[[noreturn]] inline void refuse(const Place &at, const std::string &what) {
  const char *slash = std::strrchr(at.file, '/');
  stop(std::string(slash ? slash + 1 : at.file) + ":" + text(at.line) + ": " + at.intrinsic + ": " + what);
}

inline const Region *find(const void *pointer) {
  for (const Region &region : regions()) {
    const long offset = static_cast<const char *>(pointer) - region.begin;
    if (offset >= 0 && offset < region.bytes) return &region;
  }
  return nullptr;
}

// `bytes` from `pointer` lie in one array of `memory`, and the pointer is a multiple of `alignment`.
inline void on_chip(const Place &at, int memory, const void *pointer, long bytes, long alignment) {
  const char *kind = memory == IN_NRAM ? "NRAM" : "WRAM";
  const Region *region = find(pointer);
  if (!region || region->memory != memory) refuse(at, std::string("an operand is not in a declared ") + kind + " array");
  const long offset = static_cast<const char *>(pointer) - region->begin;
  if (offset + bytes > region->bytes) {
    refuse(at, text(bytes) + " bytes from byte " + text(offset) + " of " + region->name + ", which holds " +
                   text(region->bytes));
  }
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment)) {
    refuse(at, std::string("byte ") + text(offset) + " of " + region->name + " is not a multiple of " +
                   text(alignment) + " bytes");
  }
}

inline void vector(const Place &at, const void *pointer, long bytes) {
  on_chip(at, IN_NRAM, pointer, bytes, ALIGNMENT);
}

inline void count(const Place &at, long n) {
  if (n <= 0 || n % COUNT) refuse(at, text(n) + " elements, allowed: multiples of " + text(COUNT));
}

// The same place for both may be fine, a shifted one is not.
inline void apart(const Place &at, const void *dst, long written, const void *src, long read, bool same_allowed) {
  const long distance = static_cast<const char *>(dst) - static_cast<const char *>(src);
  if (distance < read && -distance < written && !(same_allowed && distance == 0)) {
    refuse(at, "the result overlaps an operand at a distance of " + text(distance) + " bytes");
  }
}

template <typename D, typename S, typename F>
inline void unary(const Place &at, D *dst, S *src, long n, F f) {
  count(at, n);
  vector(at, dst, n * static_cast<long>(sizeof(D)));
  vector(at, src, n * static_cast<long>(sizeof(S)));
  apart(at, dst, n * static_cast<long>(sizeof(D)), src, n * static_cast<long>(sizeof(S)), sizeof(D) == sizeof(S));
  for (long i = 0; i < n; ++i) dst[i] = static_cast<D>(f(src[i]));
}

// `cycle` elements of `b` are repeated over the `n` of `a`.
template <typename F>
inline void binary(const Place &at, float *dst, float *a, float *b, long n, long cycle, F f) {
  count(at, n);
  count(at, cycle);
  if (n % cycle) refuse(at, text(n) + " elements are not a multiple of the " + text(cycle) + " repeated ones");
  vector(at, dst, n * 4);
  vector(at, a, n * 4);
  vector(at, b, cycle * 4);
  apart(at, dst, n * 4, a, n * 4, true);
  apart(at, dst, n * 4, b, cycle * 4, n == cycle);
  for (long start = 0; start < n; start += cycle) {
    for (long i = 0; i < cycle; ++i) dst[start + i] = f(a[start + i], b[i]);
  }
}

inline void end_of_copy(const Place &at, int memory, const void *pointer, long size, long stride, long more) {
  if (size <= 0 || stride < 0 || more < 0) refuse(at, "negative or empty sizes");
  const long alignment = memory == IN_WRAM ? FILTER_BYTES : 1;
  on_chip(at, memory, pointer, stride * more + size, alignment);
}

inline void not_on_chip(const Place &at, const void *pointer) {
  if (find(pointer)) refuse(at, "the direction says GDRAM, but the address is in an on-chip array");
}

inline void copy(const Place &at, void *dst, const void *src, long size, int way, long to, long from, long more) {
  if (way == NRAM2GDRAM) {
    not_on_chip(at, dst);
  } else {
    end_of_copy(at, way == NRAM2WRAM ? IN_WRAM : IN_NRAM, dst, size, to, more);
  }
  if (way == GDRAM2NRAM) {
    not_on_chip(at, src);
  } else {
    end_of_copy(at, IN_NRAM, src, size, from, more);
  }
  if (way == NRAM2NRAM) {
    apart(at, dst, to * more + size, src, from * more + size, false);
  }
  for (long i = 0; i <= more; ++i) {
    std::memcpy(static_cast<char *>(dst) + i * to, static_cast<const char *>(src) + i * from, static_cast<size_t>(size));
  }
}

template <typename T>
struct Same {
  typedef T type;
};

}  // namespace bang

// ------------------------------------------------------------------------------------------------ intrinsics
// Copies: `size` bytes; the strided form moves `more` + 1 segments.

inline void __memcpy(void *dst, const void *src, long size, mluMemcpyDirection_t way, BANG_AT) {
  bang::copy(BANG_HERE, dst, src, size, way, 0, 0, 0);
}
inline void __memcpy(void *dst, const void *src, long size, mluMemcpyDirection_t way, int to, int from, int more,
                     BANG_AT) {
  bang::copy(BANG_HERE, dst, src, size, way, to, from, more);
}

#define BANG_BINARY(name, expression)                                                                 \
  inline void name(float *dst, float *a, float *b, int n, BANG_AT) {                                  \
    bang::binary(BANG_HERE, dst, a, b, n, n, [](float x, float y) -> float { return expression; });   \
  }
#define BANG_CYCLE(name, expression)                                                                       \
  inline void name(float *dst, float *a, float *b, int n, int cycle, BANG_AT) {                            \
    bang::binary(BANG_HERE, dst, a, b, n, cycle, [](float x, float y) -> float { return expression; });    \
  }
BANG_BINARY(__bang_add, x + y)
BANG_BINARY(__bang_mul, x * y)
BANG_BINARY(__bang_sub, x - y)
BANG_BINARY(__bang_maxequal, x > y ? x : y)
BANG_BINARY(__bang_minequal, x < y ? x : y)
BANG_CYCLE(__bang_cycle_sub, x - y)
BANG_CYCLE(__bang_cycle_mul, x *y)

inline void __bang_add_scalar(float *dst, float *src, float value, int n, BANG_AT) {
  bang::unary(BANG_HERE, dst, src, n, [=](float x) { return x + value; });
}
inline void __bang_mul_scalar(float *dst, float *src, float value, int n, BANG_AT) {
  bang::unary(BANG_HERE, dst, src, n, [=](float x) { return x * value; });
}
inline void __bang_mul_scalar(int32_t *dst, int32_t *src, int32_t value, int n, BANG_AT) {
  bang::unary(BANG_HERE, dst, src, n, [=](int32_t x) {
    return static_cast<int32_t>(static_cast<uint32_t>(x) * static_cast<uint32_t>(value));
  });
}
inline void __bang_lt_scalar(float *dst, float *src, float value, int n, BANG_AT) {
  bang::unary(BANG_HERE, dst, src, n, [=](float x) { return x < value ? 1.0f : 0.0f; });
}
inline void __bang_pow2(float *dst, float *src, int n, BANG_AT) {
  bang::unary(BANG_HERE, dst, src, n, [](float x) { return std::exp2(x); });
}
inline void __bang_recip(float *dst, float *src, int n, BANG_AT) {
  bang::unary(BANG_HERE, dst, src, n, [](float x) { return 1.0f / x; });
}
inline void __bang_int82float(float *dst, int8_t *src, int n, int position, BANG_AT) {
  if (position) bang::refuse(BANG_HERE, "only position 0 is emulated");
  bang::unary(BANG_HERE, dst, src, n, [](int8_t x) { return static_cast<float>(x); });
}
inline void __bang_float2int32(int32_t *dst, float *src, int n, int position, BANG_AT) {
  if (position) bang::refuse(BANG_HERE, "only position 0 is emulated");
  bang::unary(BANG_HERE, dst, src, n, [](float x) { return std::nearbyint(x); });
}

template <typename T>
inline void __bang_write_value(T *dst, int n, typename bang::Same<T>::type value, BANG_AT) {
  bang::count(BANG_HERE, n);
  bang::vector(BANG_HERE, dst, n * static_cast<long>(sizeof(T)));
  for (int i = 0; i < n; ++i) dst[i] = value;
}

// [height, width] -> [width, height]; both sides in units of 64 bytes.
template <typename T>
inline void __bang_transpose(T *dst, T *src, int height, int width, BANG_AT) {
  const long unit = 64 / static_cast<long>(sizeof(T)), n = static_cast<long>(height) * width;
  if (height <= 0 || width <= 0 || height % unit || width % unit) {
    bang::refuse(BANG_HERE, bang::text(height) + " by " + bang::text(width) + ", allowed: multiples of " + bang::text(unit));
  }
  bang::vector(BANG_HERE, dst, n * static_cast<long>(sizeof(T)));
  bang::vector(BANG_HERE, src, n * static_cast<long>(sizeof(T)));
  bang::apart(BANG_HERE, dst, n * static_cast<long>(sizeof(T)), src, n * static_cast<long>(sizeof(T)), false);
  for (long block = 0; block < height; block += 16) {
    for (long j = 0; j < width; ++j) {
      for (long i = block; i < block + 16 && i < height; ++i) dst[j * height + i] = src[i * width + j];
    }
  }
}

namespace bang {

inline void filter(const Place &at, long filters, long depth) {
  if (filters <= 0 || filters % FILTERS) refuse(at, text(filters) + " filters, allowed: multiples of " + text(FILTERS));
  if (depth <= 0 || depth * 4 % FILTER_BYTES) {
    refuse(at, text(depth) + " numbers per filter, allowed: multiples of " + text(FILTER_BYTES / 4));
  }
}

}  // namespace bang

// The order in which the matrix unit wants weights is the machine's business. Here it is the transpose, so that a
// kernel that forgets the step, or does it twice, is wrong.
inline void __bang_reshape_filter(float *dst, float *src, int n, int h, int w, int c, BANG_AT) {
  const long depth = static_cast<long>(h) * w * c;
  bang::filter(BANG_HERE, n, depth);
  bang::vector(BANG_HERE, dst, n * depth * 4);
  bang::vector(BANG_HERE, src, n * depth * 4);
  bang::apart(BANG_HERE, dst, n * depth * 4, src, n * depth * 4, false);
  for (long i = 0; i < n; ++i) {
    for (long j = 0; j < depth; ++j) dst[j * n + i] = src[i * depth + j];
  }
}

// dst [m, n] = a [m, k] times the n filters of k numbers in WRAM.
inline void __bang_matmul(float *dst, float *a, float *filters, int m, int k, int n, BANG_AT) {
  if (m <= 0) bang::refuse(BANG_HERE, "no rows");
  bang::filter(BANG_HERE, n, k);
  bang::vector(BANG_HERE, dst, static_cast<long>(m) * n * 4);
  bang::vector(BANG_HERE, a, static_cast<long>(m) * k * 4);
  bang::on_chip(BANG_HERE, bang::IN_WRAM, filters, static_cast<long>(n) * k * 4, bang::FILTER_BYTES);
  bang::apart(BANG_HERE, dst, static_cast<long>(m) * n * 4, a, static_cast<long>(m) * k * 4, false);
  for (long i = 0; i < m; ++i) {
    float *out = dst + i * n;
    for (long j = 0; j < n; ++j) out[j] = 0.0f;
    for (long p = 0; p < k; ++p) {
      const float x = a[i * k + p];
      const float *row = filters + p * n;
      for (long j = 0; j < n; ++j) out[j] += x * row[j];
    }
  }
}

// ------------------------------------------------------------------------------------------------ launches

static int taskId = 0;
static int taskDim = 1;

namespace bang {

inline long declared(int memory) {
  long used = 0;
  for (const Region &region : regions()) {
    if (region.memory == memory) used += (region.bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  }
  return used;
}

inline void capacity(int memory, const char *kind, long limit) {
  const long used = declared(memory);
  if (used <= limit) return;
  std::string names;
  for (const Region &region : regions()) {
    if (region.memory == memory) names += std::string(names.empty() ? "" : ", ") + region.name + " " + text(region.bytes);
  }
  stop(std::string(kind) + ": " + text(used) + " bytes declared (" + names + "), capacity " + text(limit));
}

// What a core finds in its memories is not a number: a kernel that reads before it writes shows.
inline void poison() {
  for (const Region &region : regions()) std::memset(region.begin, 0xff, static_cast<size_t>(region.bytes));
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Indices<I...> type;
};

template <typename... A, int... I>
inline void call(void (*entry)(A...), void **arguments, Indices<I...>) {
  entry(*static_cast<typename std::remove_const<A>::type *>(arguments[I])...);
}

// Runs all tasks one after another; nullptr, or what went wrong. `arguments` point to the values of the parameters.
template <typename... A>
inline const char *launch(void (*entry)(A...), int tasks, void **arguments) {
  static std::string message;
  message.clear();
  launched() = true;
  try {
    capacity(IN_NRAM, "NRAM", NRAM_BYTES);
    capacity(IN_WRAM, "WRAM", WRAM_BYTES);
    taskDim = tasks;
    for (taskId = 0; taskId < tasks; ++taskId) {
      poison();
      call(entry, arguments, typename Count<sizeof...(A)>::type());
    }
  } catch (const Stop &stopped) {
    message = stopped.message;
  }
  launched() = false;
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace bang

#define BANG_C extern "C" __attribute__((visibility("default")))
#define BANG_EXPORT(entry)                                              \
  BANG_C const char *emulate_##entry(int tasks, void **arguments) {     \
    return bang::launch(entry, tasks, arguments);                       \
  }
#define BANG_EXPORT_DECLARED \
  BANG_C int emulate_declared(int memory) { return static_cast<int>(bang::declared(memory)); }

#endif  // DSV4C_BANG_EMULATION_H
