// Products of a few rows of x with a weight that stays as it is stored: BF16 or 4-bit codes, dense or with zeros of a
// bit each. One loop serves the four: a form turns its bytes into float32 weights, sixteen at a time, and the loop
// multiplies and adds them in float32. The weights are those of the dequantised model, to the bit; so a form also
// writes the weight out, for products of many rows.
//
// Plain C at the border: sqft/kernels/decode.py has this file built and calls it through ctypes. Needs AVX-512 F, BW, VL,
// DQ, and BMI2, F16C and FMA, which every such processor has. Reads up to 64 bytes beyond a sparse form's values.

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "threads.h"

#define INLINE inline __attribute__((always_inline))

extern "C" {
struct Weight {
    int64_t form, rows, columns;
    const uint8_t *values;
    const uint64_t *mask;  // a bit a weight, words of a row begin anew
    const int32_t *ends;   // of the rows, in values
    const uint8_t *scale;  // [rows, columns / group]
    const uint8_t *zero;   // [rows, columns / group]
    int64_t scale_type, group;
};
}

namespace {

constexpr int LANES = 16;
constexpr int MOST = 8;       // rows of x at a time
constexpr int WIDEST = 1024;  // columns that are unpacked at a time, of sparse codes
enum { BF16, FP16, FP32 };

INLINE __m512 widened(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE __m512i rounded(__m512 x) {  // to bfloat16, nearest even, in the upper halves; x is finite
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

INLINE __mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (1u << count) - 1; }

INLINE float half(const void *place, int64_t index, int64_t type) {
    uint32_t bits;
    uint16_t narrow;
    if (type == FP32) {
        memcpy(&bits, (const uint8_t *)place + 4 * index, 4);
    } else {
        memcpy(&narrow, (const uint8_t *)place + 2 * index, 2);
        if (type == FP16) return _cvtsh_ss(narrow);
        bits = (uint32_t)narrow << 16;
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// q - z of all codes q, for each zero point z.
struct Steps {
    alignas(64) float of[LANES][LANES];
    Steps() {
        for (int z = 0; z < LANES; z++)
            for (int q = 0; q < LANES; q++) of[z][q] = (float)(q - z);
    }
};
const Steps steps;

// The weight of each code, group after group along a row: s (q - z), rounded to bfloat16.
struct Groups {
    const Weight &w;
    int64_t next, left = 0;
    __m512 table;

    INLINE Groups(const Weight &w, int64_t row, int64_t column)
        : w(w), next(row * (w.columns / w.group) + column / w.group), left(-(column % w.group)) {
        if (left) load(), left += w.group;
    }
    INLINE bool at_start() const { return left == 0; }
    INLINE void load() {
        uint8_t zero = w.zero[next];
        __m512 scale = _mm512_set1_ps(half(w.scale, next++, w.scale_type));
        __m512i value = rounded(_mm512_mul_ps(scale, _mm512_load_ps(steps.of[zero])));
        table = _mm512_castsi512_ps(_mm512_and_si512(value, _mm512_set1_epi32((int)0xffff0000)));
    }
    INLINE void advance() {  // to the next sixteen columns, whose group's table is then there
        if (left == 0) load(), left = w.group;
        left -= LANES;
    }
};

// Forms. `block` gives the weights of the b-th block: of its first n chunks of sixteen columns, chunk i beginning at
// column `place(b, i)`.

struct DenseBF16 {
    static constexpr int chunks = 4;
    const uint16_t *row;
    int64_t columns;
    INLINE DenseBF16(const Weight &w, int64_t o, uint8_t *) : row((const uint16_t *)w.values + o * w.columns), columns(w.columns) {}
    INLINE int64_t place(int64_t b, int i) const { return 64 * b + LANES * i; }
    INLINE void block(int64_t b, int n, __m512 *out) {
        for (int i = 0; i < n; i++) {
            int64_t at = place(b, i);
            out[i] = widened(n == chunks ? _mm256_loadu_si256((const __m256i *)(row + at))
                                         : _mm256_maskz_loadu_epi16(first(columns - at), row + at));
        }
    }
};

struct SparseBF16 {
    static constexpr int chunks = 4;
    const uint64_t *mask;
    const uint16_t *value;
    INLINE SparseBF16(const Weight &w, int64_t o, uint8_t *)
        : mask(w.mask + o * ((w.columns + 63) / 64)), value((const uint16_t *)w.values + (o ? w.ends[o - 1] : 0)) {}
    INLINE int64_t place(int64_t b, int i) const { return 64 * b + LANES * i; }
    INLINE void block(int64_t b, int n, __m512 *out) {
        uint64_t kept = mask[b];
        for (int i = 0; i < n; i++) {
            const uint16_t *from = value + (i ? _mm_popcnt_u64(kept << (64 - LANES * i)) : 0);
            out[i] = _mm512_maskz_expand_ps((__mmask16)(kept >> LANES * i),
                                            widened(_mm256_loadu_si256((const __m256i *)from)));
        }
        value += _mm_popcnt_u64(kept);
    }
};

// Byte j of a row of codes holds columns j (low half) and width + j, see sqft.core.grid.pack_codes.
struct DenseINT4 {
    static constexpr int chunks = 2;
    const uint8_t *row;
    int64_t width;
    Groups low, high;
    INLINE DenseINT4(const Weight &w, int64_t o, uint8_t *)
        : row(w.values + o * (w.columns / 2)), width(w.columns / 2), low(w, o, 0), high(w, o, w.columns / 2) {}
    INLINE int64_t place(int64_t b, int i) const { return LANES * b + i * width; }
    INLINE void block(int64_t b, int, __m512 *out) {
        __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(row + LANES * b)));
        low.advance(), high.advance();
        out[0] = _mm512_permutexvar_ps(codes, low.table);  // looks at the lowest four bits alone
        out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), high.table);
    }
};

// Codes of the kept weights in order, two a byte, the low one first; those of a group begin at a whole byte. The codes
// of a stretch are laid out a byte each, in `codes`; then sixteen columns take theirs from there, as many as the mask has.
// Far enough behind: a load of what was just stored in other portions would wait.
struct SparseINT4 {
    static constexpr int chunks = 4;
    const uint64_t *mask;
    const uint8_t *values;
    uint8_t *codes, *code;
    int64_t left;  // blocks
    Groups groups;
    INLINE SparseINT4(const Weight &w, int64_t o, uint8_t *codes)
        : mask(w.mask + o * ((w.columns + 63) / 64)), values(w.values + (o ? w.ends[o - 1] : 0)), codes(codes),
          left((w.columns + 63) / 64), groups(w, o, 0) {}
    INLINE int64_t place(int64_t b, int i) const { return 64 * b + LANES * i; }
    INLINE void unpack(const uint64_t *words, int64_t group) {
        const int64_t count = left < WIDEST / 64 ? left : WIDEST / 64;
        const uint8_t *from = values;
        uint8_t *to = code = codes;
        left -= count;
        auto lay = [&](uint64_t kept) __attribute__((always_inline)) {
            __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)from));
            w = _mm512_and_si512(_mm512_or_si512(w, _mm512_slli_epi16(w, 4)), _mm512_set1_epi8(15));
            _mm512_storeu_si512(to, w);
            to += _mm_popcnt_u64(kept);
        };
        if (group < 64) {
            const uint64_t most = (1ull << group) - 1;
            for (int64_t i = 0; i < count; i++)
                for (int64_t bit = 0; bit < 64; bit += group) {
                    uint64_t kept = words[i] >> bit & most;
                    lay(kept), from += (_mm_popcnt_u64(kept) + 1) / 2;
                }
        } else if (group == 64) {
            for (int64_t i = 0; i < count; i++) lay(words[i]), from += (_mm_popcnt_u64(words[i]) + 1) / 2;
        } else {
            for (int64_t i = 0; i < count;) {
                const uint8_t *start = from;
                int64_t all = 0;  // of the group
                for (int64_t j = 0; j < group / 64 && i < count; j++, i++) all += _mm_popcnt_u64(words[i]);
                for (int64_t j = 0; j < all; j += 64, from += 32) lay(all - j < 64 ? ((1ull << (all - j)) - 1) : ~0ull);
                from = start + (all + 1) / 2;
            }
        }
        values = from;
    }
    INLINE void block(int64_t b, int n, __m512 *out) {
        if (b % (WIDEST / 64) == 0) unpack(mask + b, groups.w.group);
        uint64_t kept = mask[b];
        for (int i = 0; i < n; i++) {
            groups.advance();
            const uint8_t *from = code + (i ? _mm_popcnt_u64(kept << (64 - LANES * i)) : 0);
            __m512i compact = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
            __mmask16 here = (__mmask16)(kept >> LANES * i);
            out[i] = _mm512_maskz_permutexvar_ps(here, _mm512_maskz_expand_epi32(here, compact), groups.table);
        }
        code += _mm_popcnt_u64(kept);
    }
};

template <class Form>
INLINE int64_t whole_blocks(const Weight &w) { return w.columns / (LANES * Form::chunks); }

template <class Form>
INLINE int rest_chunks(const Weight &w) {
    return (int)((w.columns % (LANES * Form::chunks) + LANES - 1) / LANES);
}

struct Product {
    const Weight &w;
    const float *x;  // [count or more, stride], zeros behind the columns
    int64_t stride, count;
    const void *bias;
    void *y;  // [count, rows]
    int64_t type;
};

void store(const Product &p, int64_t t, int64_t o, float sum) {
    if (p.bias) sum += half(p.bias, o, p.type);
    int64_t at = t * p.w.rows + o;
    if (p.type == FP32) {
        ((float *)p.y)[at] = sum;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &sum, 4);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    ((uint16_t *)p.y)[at] = nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// R rows of the weight at a time, so that x is loaded once for all of them; T rows of x, so that these are decoded once.
template <class Form, int R, int T>
INLINE void multiply(const Product &p, int64_t t0, int64_t o) {
    // Sums of a result: one alone would wait for each addition. Not a matter of R: threads part rows, and not results.
    constexpr int WAYS = T > 1 ? 1 : 2;
    const float *x = p.x + t0 * p.stride;
    const int64_t blocks = whole_blocks<Form>(p.w);
    alignas(64) uint8_t room[2][WIDEST + 64];
    Form one(p.w, o, room[0]), two(p.w, o + R - 1, room[1]);
    __m512 sum[R][WAYS][T], weight[R][Form::chunks];
    for (int r = 0; r < R; r++)
        for (int k = 0; k < WAYS; k++)
            for (int t = 0; t < T; t++) sum[r][k][t] = _mm512_setzero_ps();
    auto add = [&](int64_t b, int n) __attribute__((always_inline)) {
        for (int r = 0; r < R; r++) (r ? two : one).block(b, n, weight[r]);
        for (int i = 0; i < n; i++)
            for (int t = 0; t < T; t++) {
                __m512 part = _mm512_loadu_ps(x + t * p.stride + one.place(b, i));
                for (int r = 0; r < R; r++) sum[r][i % WAYS][t] = _mm512_fmadd_ps(weight[r][i], part, sum[r][i % WAYS][t]);
            }
    };
    for (int64_t b = 0; b < blocks; b++) add(b, Form::chunks);
    if (int rest = rest_chunks<Form>(p.w)) add(blocks, rest);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T && t0 + t < p.count; t++) {
            for (int k = 1; k < WAYS; k++) sum[r][0][t] = _mm512_add_ps(sum[r][0][t], sum[r][k][t]);
            store(p, t0 + t, o + r, _mm512_reduce_add_ps(sum[r][0][t]));
        }
}

template <class Form, int T>
void multiply_tile(const Product &p, int64_t t0, int64_t begin, int64_t end) {
    int64_t o = begin;
    for (; o + 2 <= end; o += 2) multiply<Form, 2, T>(p, t0, o);
    if (o < end) multiply<Form, 1, T>(p, t0, o);
}

// Rows of x that are multiplied at a time where so many are left; there is room for all of them.
int64_t tile(int64_t left) { return left > 4 ? MOST : left > 2 ? 4 : left; }

template <class Form>
void multiply_rows(const void *job, int64_t begin, int64_t end) {
    const Product &p = *(const Product *)job;
    for (int64_t t = 0; t < p.count; t += MOST) {
        int64_t rows = tile(p.count - t);
        if (rows == 1) multiply_tile<Form, 1>(p, t, begin, end);
        else if (rows == 2) multiply_tile<Form, 2>(p, t, begin, end);
        else if (rows == 4) multiply_tile<Form, 4>(p, t, begin, end);
        else multiply_tile<Form, MOST>(p, t, begin, end);
    }
}

struct Writing {
    const Weight &w;
    uint16_t *out;  // [rows, columns]
};

template <class Form>
void write_rows(const void *job, int64_t begin, int64_t end) {
    const Writing &p = *(const Writing *)job;
    const int64_t columns = p.w.columns, blocks = whole_blocks<Form>(p.w);
    const int rest = rest_chunks<Form>(p.w);
    for (int64_t o = begin; o < end; o++) {
        alignas(64) uint8_t room[WIDEST + 64];
        Form form(p.w, o, room);
        __m512 weight[Form::chunks];
        for (int64_t b = 0; b < blocks + (rest != 0); b++) {
            int n = b < blocks ? Form::chunks : rest;
            form.block(b, n, weight);
            for (int i = 0; i < n; i++) {
                int64_t at = form.place(b, i);
                __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(weight[i]), 16));
                _mm256_mask_storeu_epi16(p.out + o * columns + at, first(columns - at), halves);
            }
        }
    }
}

const Rows MULTIPLY[] = {multiply_rows<DenseBF16>, multiply_rows<SparseBF16>, multiply_rows<DenseINT4>,
                         multiply_rows<SparseINT4>};
const Rows WRITE[] = {write_rows<DenseBF16>, write_rows<SparseBF16>, write_rows<DenseINT4>, write_rows<SparseINT4>};

}  // namespace

extern "C" {

int sqft_supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("fma");
}

// y [count, rows] = x [count, columns] W^T + bias; x, bias and y have the same type. 0: done, 1: out of memory.
int sqft_multiply(const Weight *w, const void *x, const void *bias, void *y, int64_t count, int64_t type,
                  int64_t threads) {
    int64_t stride = (w->columns + 63) / 64 * 64;
    int64_t most = count / MOST * MOST + tile(count % MOST);
    float *wide = (float *)aligned_alloc(64, most * stride * sizeof(float));
    if (!wide) return 1;
    memset(wide + count * stride, 0, (most - count) * stride * sizeof(float));
    for (int64_t t = 0; t < count; t++) {
        float *to = wide + t * stride;
        if (type == FP32)
            memcpy(to, (const float *)x + t * w->columns, w->columns * sizeof(float));
        else
            for (int64_t i = 0; i < w->columns; i += LANES)
                _mm512_storeu_ps(to + i, widened(_mm256_maskz_loadu_epi16(
                                             first(w->columns - i), (const uint16_t *)x + t * w->columns + i)));
        memset(to + w->columns, 0, (stride - w->columns) * sizeof(float));
    }
    Product product{*w, wide, stride, count, bias, y, type};
    share(MULTIPLY[w->form], &product, w->rows, threads);
    free(wide);
    return 0;
}

// out [rows, columns] = W in bfloat16.
void sqft_write(const Weight *w, uint16_t *out, int64_t threads) {
    Writing writing{*w, out};
    share(WRITE[w->form], &writing, w->rows, threads);
}
}
