// What the kernels share: declaring on-chip arrays, reading rows, and products through the matrix unit.
//
// Build definitions (build.py computes them): NRAM_BYTES and WRAM_BYTES, what a kernel may use of the on-chip
// memories, and the tile sizes of the kernel. C++11, because that is what cncc is told to take.
#ifndef DSV4C_TILING_H
#define DSV4C_TILING_H

#include <bang.h>

#if defined(__BANG_ARCH__)
// The compiler keeps 128 KB of NRAM for the stack.
#if NRAM_BYTES > __MLU_NRAM_SIZE__ * 1024 - 128 * 1024 || WRAM_BYTES > __MLU_WRAM_SIZE__ * 1024
#error "NRAM_BYTES or WRAM_BYTES is more than this arch has"
#endif
#endif

#ifndef BANG_REGISTER
#define BANG_REGISTER(memory, name) static_assert(sizeof(name) % 128 == 0, #name)
#endif

// An array of whole vectors; the vector unit takes addresses that are multiples of 128 bytes.
#define NRAM_ARRAY(type, name, count)                          \
  __nram__ __attribute__((aligned(128))) type name[count];     \
  BANG_REGISTER(bang::IN_NRAM, name)
#define WRAM_ARRAY(type, name, count)                          \
  __wram__ __attribute__((aligned(128))) type name[count];     \
  BANG_REGISTER(bang::IN_WRAM, name)

#define LANES 64  // counts of vector instructions are multiples of it

__mlu_func__ int least(int a, int b) { return a < b ? a : b; }

__mlu_func__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

__mlu_func__ int whole(int count) { return ceil_div(count, LANES) * LANES; }

// x [n] := e^x. The machine has powers of two.
__mlu_func__ void exponential(float *x, int n) {
  __bang_mul_scalar(x, x, 1.44269504088896341f, n);
  __bang_pow2(x, x, n);
}

// dst [rows, width] := `rows` rows of `count` numbers, `stride` apart in GDRAM; the rest of each row is left alone.
template <typename T>
__mlu_func__ void read_rows(T *dst, int width, const T *src, int64_t stride, int rows, int count) {
  if (rows <= 0 || count <= 0) return;
  if (rows == 1) {
    __memcpy(dst, src, count * (int)sizeof(T), GDRAM2NRAM);
    return;
  }
  __memcpy(dst, src, count * (int)sizeof(T), GDRAM2NRAM, width * (int)sizeof(T), (int)(stride * (int64_t)sizeof(T)),
           rows - 1);
}

// Weight rows [n, k] in NRAM become the filters of the matrix unit; `ordered` [n, k] is scratch.
__mlu_func__ void load_filters(float *wram, float *ordered, float *rows, int n, int k) {
  __bang_reshape_filter(ordered, rows, n, 1, 1, k);
  __memcpy(wram, ordered, n * k * (int)sizeof(float), NRAM2WRAM);
}

#endif  // DSV4C_TILING_H
