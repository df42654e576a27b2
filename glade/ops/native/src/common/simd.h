/* Vectors of LANES floats in GCC's and Clang's vector extensions: no intrinsics, one source for every instruction set.
 * LANES is given by the build. Every function here is lane-wise or a fixed permutation, so results do not depend on
 * how the work is split. */
#ifndef GLADE_SIMD_H
#define GLADE_SIMD_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
/* the same in memory, at any address */
typedef float vec_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t hvec_at __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#if LANES == 16
#define EACH_LANE(x) x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define EACH_LANE(x) x, x, x, x, x, x, x, x
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#elif LANES == 4
#define EACH_LANE(x) x, x, x, x
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#else
#error "LANES must be 4, 8 or 16"
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE_AS(order, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE_AS
#define SHUFFLE_AS(order, x, y, ...) __builtin_shuffle(x, y, (order){__VA_ARGS__})
#endif
#define SHUFFLE(x, y, ...) SHUFFLE_AS(ivec, x, y, __VA_ARGS__)

INLINE vec load(const float *p) { return *(const vec_at *)p; }
INLINE void store(float *p, vec x) { *(vec_at *)p = x; }
INLINE vec splat(float x) { return (vec){EACH_LANE(x)}; }
INLINE vec select_vec(ivec mask, vec x, vec y) { return (vec)(((ivec)x & mask) | ((ivec)y & ~mask)); }

/* the limit where x is beyond it; nan stays nan */
#if defined(__AVX512F__) && LANES == 16
INLINE vec at_most_vec(vec x, vec limit) {
    __asm__("vminps %0, %1, %0" : "+v"(x) : "v"(limit));
    return x;
}
INLINE vec at_least_vec(vec x, vec limit) {
    __asm__("vmaxps %0, %1, %0" : "+v"(x) : "v"(limit));
    return x;
}
#else
INLINE vec at_most_vec(vec x, vec limit) { return select_vec(x > limit, limit, x); }
INLINE vec at_least_vec(vec x, vec limit) { return select_vec(x < limit, limit, x); }
#endif

INLINE vec zip_low(vec x, vec y) { return SHUFFLE(x, y, ZIP_LOW); }
INLINE vec zip_high(vec x, vec y) { return SHUFFLE(x, y, ZIP_HIGH); }

/* e^x within 2 ulp; exactly 0 below -104 (and at -inf), inf above 88.7, nan for nan */
INLINE vec exp_vec(vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    ivec vanishes = x < -104.0f;
    x = select_vec(vanishes, splat(-104.0f), x);
    x = select_vec(x > 89.0f, splat(89.0f), x);
    vec shifted = x * 1.44269504088896341f + magic;
    vec n = shifted - magic;
    vec r = x - n * 0.693359375f; /* ln 2 in two parts, the first exact in a product with n */
    r = r + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    vec y = p * (r * r) + r + 1.0f;
    /* 2^n in two factors, since n may be beyond the exponents of normal numbers */
    ivec power = (ivec)shifted - 0x4b400000;
    ivec half = power >> 1;
    vec first = (vec)((uvec)(half + 127) << 23), second = (vec)((uvec)(power - half + 127) << 23);
    return select_vec(vanishes, splat(0.0f), y * first * second);
}

INLINE vec from_bfloat16(hvec x) {
#if defined(__AVX512F__) && LANES == 16
    uvec wide; /* GCC would widen the two halves and join them */
    __asm__("vpmovzxwd %1, %0" : "=v"(wide) : "vm"(x));
    return (vec)(wide << 16);
#else
    return (vec)(__builtin_convertvector(x, uvec) << 16);
#endif
}

/* to nearest, ties to even; nan stays nan */
INLINE hvec to_bfloat16(vec x) {
#if defined(__AVX512BF16__) && LANES == 16
    /* in assembly: the compilers disagree on the types of the builtin. What is below 1e-38 becomes 0 */
    hvec halves;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x));
    return halves;
#else
    uvec bits = (uvec)x;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ivec is_nan = x != x;
    rounded = (rounded & ~(uvec)is_nan) | ((uvec)is_nan & 0x7fc0);
    return __builtin_convertvector(rounded, hvec);
#endif
}

/* LANES vectors x -> lane r of the answer is the sum over the lanes of x[r]; x is used up */
INLINE vec sums_of(vec *x) {
    UNROLL for (int half = LANES / 2; half >= 1; half /= 2) {
        UNROLL for (int i = 0; i < half; i++) x[i] = zip_low(x[i], x[i + half]) + zip_high(x[i], x[i + half]);
    }
    return x[0];
}

/* a block of LANES x LANES */
INLINE void transpose_block(float *out, long out_row, const float *in, long in_row) {
    vec x[LANES], y[LANES];
    UNROLL for (int i = 0; i < LANES; i++) x[i] = load(in + i * in_row);
    UNROLL for (int stage = 1; stage < LANES; stage *= 2) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = zip_low(x[i], x[i + LANES / 2]);
            y[2 * i + 1] = zip_high(x[i], x[i + LANES / 2]);
        }
        UNROLL for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
    UNROLL for (int i = 0; i < LANES; i++) store(out + i * out_row, x[i]);
}

#if defined(__AVX512BF16__) && LANES == 16
#define BFLOAT16_PAIRS 1
typedef int16_t short_pairs __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* 2 * LANES numbers rounded to bf16, x first. In assembly: the compilers disagree on the types of the builtins. */
INLINE uvec round_pairs(vec x, vec y) {
    uvec both;
    __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(y), "v"(x));
    return both;
}

/* lane i: x[i] in the low half, y[i] in the high half, both rounded to bf16 */
INLINE uvec zip_pairs(vec x, vec y) {
    short_pairs both = (short_pairs)round_pairs(x, y);
    return (uvec)SHUFFLE_AS(short_pairs, both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25,
                            10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

/* sum + x * y in both halves of each lane; what is below 1e-38 counts as 0 */
INLINE vec add_pair_products(vec sum, uvec x, uvec y) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
    return sum;
}
#endif

INLINE long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

#endif
