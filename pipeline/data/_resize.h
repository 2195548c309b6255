/* A resize with an antialiased filter, as Pillow's: a horizontal, then a vertical pass with
 * precomputed fixed-point weights and 8-bit rows between them (Pillow's src/libImaging/Resample.c
 * describes the method). The scalar, the AVX2 and the AVX-512 loops give the same bits.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && (__GNUC__ >= 9 || defined(__clang__))
#define HAVE_SIMD_CODE 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512vnni")))
#define INLINE __attribute__((always_inline)) static inline
#endif

enum {
    PRECISION = 14, /* bits behind the point of a weight; weights lie in (-2, 2) */
    GROUP = 4,      /* weights of one step of the horizontal pass: 16 bytes of pixels */
    PIXEL = 4,      /* bytes of a pixel between the passes: R, G, B, unused */
    TOGETHER = 4    /* rows that the horizontal pass takes at once, and pixels it makes of each */
};

enum { SCALAR, WITH_AVX2, WITH_AVX512 };

/* Weights that turn source pixels into `out` pixels along one axis. */
typedef struct {
    int out, taps;    /* taps: weights per output pixel, padded with zeros */
    int first, last;  /* source pixels that any output pixel needs: [first, last) */
    int *start;       /* [out] first source pixel of each output pixel */
    int16_t *weight;  /* [out][taps] */
} Axis;

/* ---------------------------------------------------------------- weights */

static double bicubic(double x) { /* Keys' cubic with a = -0.5, as Pillow's */
    x = fabs(x);
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
    if (x < 2.0) return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0;
    return 0.0;
}

static double triangle(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

/* The source pixels [begin, end) that the filter reaches from `centre`. */
static void reach(double centre, double support, int low, int high, int *begin, int *end) {
    *begin = (int)(centre - support + 0.5);
    *end = (int)(centre + support + 0.5);
    if (*begin < low) *begin = low;
    if (*end > high) *end = high;
    if (*end <= *begin) { /* a rectangle that lies on the border by a rounding error */
        *begin = *begin < high ? *begin : high - 1;
        *end = *begin + 1;
    }
}

/* Weights for the source interval [from, to) of an axis; pixels outside [low, high) do not
 * count. The number of weights is padded to a multiple of `pad`. Returns 0 if memory is short. */
static int make_axis(Axis *axis, int out, double from, double to, int low, int high,
                     int cubic, int flip, int pad) {
    double scale = (to - from) / out, stretch = scale < 1.0 ? 1.0 : scale;
    double support = (cubic ? 2.0 : 1.0) * stretch;
    int most = 1, begin, end;
    axis->first = high;
    axis->last = low;
    for (int i = 0; i < out; i++) {
        reach(from + (i + 0.5) * scale, support, low, high, &begin, &end);
        if (end - begin > most) most = end - begin;
        if (begin < axis->first) axis->first = begin;
        if (end > axis->last) axis->last = end;
    }
    axis->out = out;
    axis->taps = (most + pad - 1) / pad * pad;
    axis->start = malloc(out * sizeof *axis->start);
    axis->weight = calloc((size_t)out * axis->taps, sizeof *axis->weight);
    double *exact = malloc(most * sizeof *exact);
    if (!axis->start || !axis->weight || !exact) {
        free(exact);
        return 0;
    }
    for (int i = 0; i < out; i++) {
        double centre = from + (i + 0.5) * scale, sum = 0.0;
        reach(centre, support, low, high, &begin, &end);
        for (int k = 0; k < end - begin; k++) {
            double at = (k + begin - centre + 0.5) / stretch;
            sum += exact[k] = cubic ? bicubic(at) : triangle(at);
        }
        int place = flip ? out - 1 - i : i;
        int16_t *weight = axis->weight + (size_t)place * axis->taps;
        /* The running sum is rounded, so that thousands of small weights still add up to one. */
        double unit = (1 << PRECISION) / (sum != 0.0 ? sum : 1.0), upto = 0.0, before = 0.0;
        for (int k = 0; k < end - begin; k++, before = rint(upto)) {
            upto += exact[k] * unit;
            double fixed = rint(upto) - before;
            weight[k] = (int16_t)(fixed > 32767 ? 32767 : fixed < -32768 ? -32768 : fixed);
        }
        axis->start[place] = begin;
    }
    free(exact);
    return 1;
}

static void free_axis(Axis *axis) {
    free(axis->start);
    free(axis->weight);
}

/* ---------------------------------------------------------------- the two passes */

static uint8_t to_byte(int32_t sum) {
    sum = (sum + (1 << (PRECISION - 1))) >> PRECISION;
    return sum < 0 ? 0 : sum > 255 ? 255 : (uint8_t)sum;
}

/* row: RGBX source pixels, `left` is the number of its first pixel; out: [axis->out] RGBX. */
static void horizontal(const Axis *axis, const uint8_t *row, int left, uint8_t *out) {
    for (int i = 0; i < axis->out; i++) {
        const uint8_t *in = row + (size_t)(axis->start[i] - left) * PIXEL;
        const int16_t *weight = axis->weight + (size_t)i * axis->taps;
        int32_t r = 0, g = 0, b = 0;
        for (int k = 0; k < axis->taps; k++, in += PIXEL) {
            r += in[0] * weight[k];
            g += in[1] * weight[k];
            b += in[2] * weight[k];
        }
        out[0] = to_byte(r), out[1] = to_byte(g), out[2] = to_byte(b), out[3] = 0;
        out += PIXEL;
    }
}

/* rows: RGBX, `stride` bytes apart; out: `pixels` RGB. */
static void vertical(const int16_t *weight, int taps, const uint8_t *rows, size_t stride,
                     int pixels, uint8_t *out) {
    for (int i = 0; i < pixels; i++, rows += PIXEL, out += 3)
        for (int c = 0; c < 3; c++) {
            int32_t sum = 0;
            for (int k = 0; k < taps; k++) sum += rows[k * stride + c] * weight[k];
            out[c] = to_byte(sum);
        }
}

#ifdef HAVE_SIMD_CODE
/* From two RGBX pixels of 8 bits to R0 R1 G0 G1 B0 B1 X0 X1 of 16, which a pair of weights is
 * multiplied with; n: the first byte of these pixels. */
#define PAIRS(n) n, -1, n + 4, -1, n + 1, -1, n + 5, -1, n + 2, -1, n + 6, -1, n + 3, -1, n + 7, -1

/* A pair of weights everywhere. */
INLINE int32_t pair_at(const int16_t *weight) {
    int32_t pair;
    memcpy(&pair, weight, sizeof pair);
    return pair;
}

/* One pixel of each of two rows: R, G, B, X of 32 bits, the first row in the low half. */
AVX2 INLINE __m256i sum_2_rows(const Axis *axis, int groups, const uint8_t *const row[2], int i) {
    const __m256i first = _mm256_setr_epi8(PAIRS(0), PAIRS(0));
    const __m256i second = _mm256_setr_epi8(PAIRS(8), PAIRS(8));
    const int16_t *weight = axis->weight + (size_t)i * axis->taps;
    const ptrdiff_t start = (ptrdiff_t)axis->start[i] * PIXEL;
    __m256i sum = _mm256_set1_epi32(1 << (PRECISION - 1));
    for (int k = 0; k < groups; k++, weight += GROUP) {
        const ptrdiff_t at = start + k * GROUP * PIXEL;
        __m256i four = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(row[0] + at)));
        four = _mm256_inserti128_si256(four, _mm_loadu_si128((const __m128i *)(row[1] + at)), 1);
        __m256i a = _mm256_shuffle_epi8(four, first), b = _mm256_shuffle_epi8(four, second);
        a = _mm256_madd_epi16(a, _mm256_set1_epi32(pair_at(weight)));
        b = _mm256_madd_epi16(b, _mm256_set1_epi32(pair_at(weight + 2)));
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
    }
    return _mm256_srai_epi32(sum, PRECISION);
}

AVX2 INLINE void horizontal_2_rows(const Axis *axis, int groups, const uint8_t *const row[2],
                                   uint8_t *const out[2]) {
    for (int i = 0; i < axis->out; i += TOGETHER) {
        if (i > axis->out - TOGETHER) i = axis->out - TOGETHER;
        __m256i a = _mm256_packs_epi32(sum_2_rows(axis, groups, row, i),
                                       sum_2_rows(axis, groups, row, i + 1));
        __m256i b = _mm256_packs_epi32(sum_2_rows(axis, groups, row, i + 2),
                                       sum_2_rows(axis, groups, row, i + 3));
        a = _mm256_packus_epi16(a, b);
        _mm_storeu_si128((__m128i *)(out[0] + i * PIXEL), _mm256_castsi256_si128(a));
        _mm_storeu_si128((__m128i *)(out[1] + i * PIXEL), _mm256_extracti128_si256(a, 1));
    }
}

/* row: without the pixels left of the decoded ones; both for TOGETHER rows. */
AVX2 static void horizontal_avx2(const Axis *axis, const uint8_t *const *row, uint8_t *const *out) {
    int groups = axis->taps / GROUP;
    for (int r = 0; r < TOGETHER; r += 2) {
        if (groups == 1) horizontal_2_rows(axis, 1, row + r, out + r); /* unrolled */
        else if (groups == 2) horizontal_2_rows(axis, 2, row + r, out + r);
        else if (groups == 3) horizontal_2_rows(axis, 3, row + r, out + r);
        else horizontal_2_rows(axis, groups, row + r, out + r);
    }
}

/* As sum_2_rows for four. */
AVX512 INLINE __m512i sum_4_rows(const Axis *axis, int groups, const uint8_t *const *row, int i) {
    const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(PAIRS(0)));
    const __m512i second = _mm512_broadcast_i32x4(_mm_setr_epi8(PAIRS(8)));
    const int16_t *weight = axis->weight + (size_t)i * axis->taps;
    const ptrdiff_t start = (ptrdiff_t)axis->start[i] * PIXEL;
    __m512i sum = _mm512_set1_epi32(1 << (PRECISION - 1));
    for (int k = 0; k < groups; k++, weight += GROUP) {
        const ptrdiff_t at = start + k * GROUP * PIXEL;
        const __m128i r0 = _mm_loadu_si128((const __m128i *)(row[0] + at));
        const __m128i r1 = _mm_loadu_si128((const __m128i *)(row[1] + at));
        const __m128i r2 = _mm_loadu_si128((const __m128i *)(row[2] + at));
        const __m128i r3 = _mm_loadu_si128((const __m128i *)(row[3] + at));
        __m512i four = _mm512_mask_broadcast_i32x4(_mm512_castsi128_si512(r0), 0x00F0, r1);
        four = _mm512_mask_broadcast_i32x4(four, 0x0F00, r2);
        four = _mm512_mask_broadcast_i32x4(four, 0xF000, r3);
        sum = _mm512_dpwssd_epi32(sum, _mm512_shuffle_epi8(four, first),
                                  _mm512_set1_epi32(pair_at(weight)));
        sum = _mm512_dpwssd_epi32(sum, _mm512_shuffle_epi8(four, second),
                                  _mm512_set1_epi32(pair_at(weight + 2)));
    }
    return _mm512_srai_epi32(sum, PRECISION);
}

AVX512 INLINE void horizontal_4_rows(const Axis *axis, int groups, const uint8_t *const *row,
                                     uint8_t *const *out) {
    for (int i = 0; i < axis->out; i += TOGETHER) {
        if (i > axis->out - TOGETHER) i = axis->out - TOGETHER;
        __m512i a = _mm512_packs_epi32(sum_4_rows(axis, groups, row, i),
                                       sum_4_rows(axis, groups, row, i + 1));
        __m512i b = _mm512_packs_epi32(sum_4_rows(axis, groups, row, i + 2),
                                       sum_4_rows(axis, groups, row, i + 3));
        a = _mm512_packus_epi16(a, b);
        _mm_storeu_si128((__m128i *)(out[0] + i * PIXEL), _mm512_castsi512_si128(a));
        _mm_storeu_si128((__m128i *)(out[1] + i * PIXEL), _mm512_extracti32x4_epi32(a, 1));
        _mm_storeu_si128((__m128i *)(out[2] + i * PIXEL), _mm512_extracti32x4_epi32(a, 2));
        _mm_storeu_si128((__m128i *)(out[3] + i * PIXEL), _mm512_extracti32x4_epi32(a, 3));
    }
}

AVX512 static void horizontal_avx512(const Axis *axis, const uint8_t *const *row,
                                     uint8_t *const *out) {
    int groups = axis->taps / GROUP;
    if (groups == 1) horizontal_4_rows(axis, 1, row, out);
    else if (groups == 2) horizontal_4_rows(axis, 2, row, out);
    else if (groups == 3) horizontal_4_rows(axis, 3, row, out);
    else horizontal_4_rows(axis, groups, row, out);
}

/* Four pixels at a time; the rest by the scalar loop. over: how many bytes behind the row it may
 * write. */
AVX2 static void vertical_avx2(const int16_t *weight, int taps, const uint8_t *rows,
                               size_t stride, int pixels, uint8_t *out, int over) {
    const __m256i half = _mm256_set1_epi32(1 << (PRECISION - 1));
    const __m128i pack = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    int i = 0;
    for (; 3 * i + 16 <= 3 * pixels + over; i += 4) { /* 12 of the 16 bytes count */
        const uint8_t *in = rows + (size_t)i * PIXEL;
        __m256i low = half, high = half;
        for (int k = 0; k < taps; k += 2, in += 2 * stride) {
            __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)in));
            __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(in + stride)));
            __m256i pair = _mm256_set1_epi32(pair_at(weight + k));
            low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), pair));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), pair));
        }
        low = _mm256_srai_epi32(low, PRECISION);
        high = _mm256_srai_epi32(high, PRECISION);
        __m256i words = _mm256_packs_epi32(low, high); /* in order within each half */
        __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words),
                                         _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(out + (size_t)i * 3), _mm_shuffle_epi8(bytes, pack));
    }
    vertical(weight, taps, rows + (size_t)i * PIXEL, stride, pixels - i, out + (size_t)i * 3);
}

/* Eight pixels at a time; the rest by vertical_avx2. */
AVX512 static void vertical_avx512(const int16_t *weight, int taps, const uint8_t *rows,
                                   size_t stride, int pixels, uint8_t *out, int over) {
    const __m512i half = _mm512_set1_epi32(1 << (PRECISION - 1));
    const __m256i pack = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    int i = 0;
    for (; 3 * i + 28 <= 3 * pixels + over; i += 8) { /* 24 of the 28 bytes count */
        const uint8_t *in = rows + (size_t)i * PIXEL;
        __m512i low = half, high = half;
        for (int k = 0; k < taps; k += 2, in += 2 * stride) {
            __m512i a = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)in));
            __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(in + stride)));
            __m512i pair = _mm512_set1_epi32(pair_at(weight + k));
            low = _mm512_dpwssd_epi32(low, _mm512_unpacklo_epi16(a, b), pair);
            high = _mm512_dpwssd_epi32(high, _mm512_unpackhi_epi16(a, b), pair);
        }
        low = _mm512_srai_epi32(low, PRECISION);
        high = _mm512_srai_epi32(high, PRECISION);
        __m512i words = _mm512_max_epi16(_mm512_packs_epi32(low, high), _mm512_setzero_si512());
        __m256i bytes = _mm256_shuffle_epi8(_mm512_cvtusepi16_epi8(words), pack);
        _mm_storeu_si128((__m128i *)(out + (size_t)i * 3), _mm256_castsi256_si128(bytes));
        _mm_storeu_si128((__m128i *)(out + (size_t)i * 3 + 12), _mm256_extracti128_si256(bytes, 1));
    }
    rows += (size_t)i * PIXEL;
    vertical_avx2(weight, taps, rows, stride, pixels - i, out + (size_t)i * 3, over);
}
#endif

/* The best that this machine has, at most `most`. */
static int find_simd(int most) {
#ifdef HAVE_SIMD_CODE
    int avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
                 && __builtin_cpu_supports("avx512vnni");
    int best = !__builtin_cpu_supports("avx2") ? SCALAR : avx512 ? WITH_AVX512 : WITH_AVX2;
    return most < best ? most : best;
#else
    (void)most;
    return SCALAR;
#endif
}

/* The horizontal pass over `count` rows, from 1 to TOGETHER; `left` is the number of their first
 * pixel. */
static void shrink_rows(const Axis *x, uint8_t *const *rows, int count, int left, uint8_t *out,
                        size_t stride, int simd) {
#ifdef HAVE_SIMD_CODE
    if (simd != SCALAR && x->out >= TOGETHER) {
        const uint8_t *in[TOGETHER];
        uint8_t *to[TOGETHER];
        for (int r = 0; r < TOGETHER; r++) { /* where there are fewer, the last one again */
            int row = r < count ? r : count - 1;
            in[r] = rows[row] - (size_t)left * PIXEL;
            to[r] = out + (size_t)row * stride;
        }
        if (simd == WITH_AVX512) horizontal_avx512(x, in, to);
        else horizontal_avx2(x, in, to);
        return;
    }
#endif
    (void)simd;
    for (int r = 0; r < count; r++) horizontal(x, rows[r], left, out + (size_t)r * stride);
}

/* The vertical pass over y->last - y->first rows of `pixels` RGBX; out: [y->out][pixels] RGB. */
static void shrink_columns(const Axis *y, const uint8_t *rows, int pixels, uint8_t *out, int simd) {
    size_t stride = (size_t)pixels * PIXEL;
    for (int i = 0; i < y->out; i++, out += (size_t)pixels * 3) {
        int over = i < y->out - 1 ? 4 : 0; /* the next row is written later */
        const uint8_t *first = rows + (size_t)(y->start[i] - y->first) * stride;
        const int16_t *weight = y->weight + (size_t)i * y->taps;
#ifdef HAVE_SIMD_CODE
        if (simd == WITH_AVX512) vertical_avx512(weight, y->taps, first, stride, pixels, out, over);
        else if (simd == WITH_AVX2) vertical_avx2(weight, y->taps, first, stride, pixels, out, over);
        else vertical(weight, y->taps, first, stride, pixels, out);
#else
        (void)simd;
        vertical(weight, y->taps, first, stride, pixels, out);
#endif
    }
}
