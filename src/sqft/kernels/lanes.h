// Sixteen float32 numbers, a lane each: one register of AVX-512, or two of AVX2.
//
// Bfloat16 numbers are widened or rounded to nearest even. What a sparse row keeps lies one behind the other: `spread`
// takes it to the lanes whose bit is set, leaves 0 in the others, and moves on. `Codes` turns two times sixteen columns of 4-bit
// codes into weights, in lanes of the order that suits the processor. `arrange` puts what they are multiplied with into
// that order, `narrow` puts them back.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;

// Tables are made by the compiler: code that ran when the library is opened would run before its processor is checked.

// q - z of all codes q, for each zero point z.
struct Steps {
    alignas(64) float of[LANES][LANES] = {};
    constexpr Steps() {
        for (int z = 0; z < LANES; z++)
            for (int q = 0; q < LANES; q++) of[z][q] = (float)(q - z);
    }
};
constexpr Steps steps;

INLINE float total(__m256 sum) {
    __m128 four = _mm_add_ps(_mm256_extractf128_ps(sum, 1), _mm256_castps256_ps128(sum));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#ifdef __AVX512F__

constexpr int SUMS = 16;  // so many there are registers for

struct Lanes {
    __m512 all;
};

INLINE Lanes zeros() { return {_mm512_setzero_ps()}; }
INLINE Lanes load(const float *from) { return {_mm512_loadu_ps(from)}; }
INLINE void store(float *to, Lanes x) { _mm512_storeu_ps(to, x.all); }
INLINE Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.all, b.all)}; }
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.all, b.all, c.all)}; }
INLINE float total(Lanes x) {
    return total(_mm256_add_ps(_mm512_extractf32x8_ps(x.all, 1), _mm512_castps512_ps256(x.all)));
}

INLINE Lanes widened(__m256i halves) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
INLINE __mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (1u << count) - 1; }
INLINE Lanes widened(const uint16_t *from) { return widened(_mm256_loadu_si256((const __m256i *)from)); }
INLINE Lanes widened(const uint16_t *from, int64_t count) { return widened(_mm256_maskz_loadu_epi16(first(count), from)); }
INLINE Lanes spread(const uint16_t *&from, uint16_t kept) {
    Lanes found{_mm512_maskz_expand_ps(kept, widened(from).all)};
    from += _mm_popcnt_u32(kept);
    return found;
}
INLINE void narrow(Lanes x, uint16_t *to, int64_t count) {  // of numbers that bfloat16 holds
    __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x.all), 16));
    _mm256_mask_storeu_epi16(to, first(count), halves);
}

// The weight of each code of a group: s (q - z), rounded to bfloat16.
struct Table {
    __m512 weight;
    INLINE void fill(float scale, int zero) {
        __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_set1_ps(scale), _mm512_load_ps(steps.of[zero])));
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        weight = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
    }
};

struct Tables {  // of the groups of two times sixteen columns
    Table low, high;
    INLINE void fill(float low_scale, int low_zero, float high_scale, int high_zero) {
        low.fill(low_scale, low_zero), high.fill(high_scale, high_zero);
    }
    INLINE Tables both(int i) const { return i ? Tables{high, high} : Tables{low, low}; }
};

// Lanes of the first sixteen columns, then of the second.
struct Codes {
    Lanes half[2];
    INLINE void read(const uint8_t *from, const Tables &tables) {  // two a byte, one of each sixteen
        __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
        // permutexvar looks at the lowest four bits alone.
        half[0] = {_mm512_permutexvar_ps(both, tables.low.weight)};
        half[1] = {_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), tables.high.weight)};
    }
    INLINE void spread(const uint8_t *&from, uint32_t kept, const Tables &tables) {  // a byte each
        half[0] = sixteen(from, kept & 0xffff, tables.low), half[1] = sixteen(from, kept >> 16, tables.high);
    }
    INLINE static Lanes sixteen(const uint8_t *&from, uint16_t kept, const Table &table) {
        __m512i compact = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
        from += _mm_popcnt_u32(kept);
        return {_mm512_maskz_permutexvar_ps(kept, _mm512_maskz_expand_epi32(kept, compact), table.weight)};
    }
    INLINE Lanes lanes(int i) const { return half[i]; }
};
INLINE void arrange(Lanes low, Lanes high, float *to) { store(to, low), store(to + LANES, high); }
INLINE void narrow(Lanes x, int i, uint16_t *low, uint16_t *high) { narrow(x, i ? high : low, LANES); }

INLINE void unpack64(const uint8_t *from, uint8_t *to) {  // 64 codes, two a byte, low one first, to a byte each
    __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)from));
    w = _mm512_and_si512(_mm512_or_si512(w, _mm512_slli_epi16(w, 4)), _mm512_set1_epi8(15));
    _mm512_storeu_si512(to, w);
}

#else

constexpr int SUMS = 4;

struct Lanes {
    __m256 low, high;
};

INLINE Lanes zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Lanes load(const float *from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE void store(float *to, Lanes x) { _mm256_storeu_ps(to, x.low), _mm256_storeu_ps(to + 8, x.high); }
INLINE Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE float total(Lanes x) { return total(_mm256_add_ps(x.high, x.low)); }

INLINE __m256 widened(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
INLINE Lanes widened(const uint16_t *from) {
    return {widened(_mm_loadu_si128((const __m128i *)from)), widened(_mm_loadu_si128((const __m128i *)(from + 8)))};
}
INLINE Lanes widened(const uint16_t *from, int64_t count) {
    if (count >= LANES) return widened(from);
    uint16_t whole[LANES] = {};
    memcpy(whole, from, count * sizeof *from);
    return widened(whole);
}

// For eight lanes, of each set of kept ones: where each takes its bytes from. A shuffle writes 0 for NONE.
struct Places {
    static constexpr uint8_t NONE = 0x80;
    alignas(32) uint8_t halves[256][32] = {};  // two bytes, to the upper half of a lane; in both halves of a register
    alignas(8) uint8_t bytes[256][8] = {};
    constexpr Places() {
        for (int kept = 0; kept < 256; kept++)
            for (int lane = 0, next = 0; lane < 8; lane++) {
                const bool is = kept >> lane & 1;
                uint8_t *half = halves[kept] + 4 * lane;
                half[0] = half[1] = NONE;
                half[2] = is ? 2 * next : NONE, half[3] = is ? 2 * next + 1 : NONE;
                bytes[kept][lane] = is ? next : NONE;
                next += is;
            }
    }
};
constexpr Places places;

INLINE __m256 spread_eight(const uint16_t *&from, uint8_t kept) {
    __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from));
    from += _mm_popcnt_u32(kept);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, _mm256_load_si256((const __m256i *)places.halves[kept])));
}
INLINE Lanes spread(const uint16_t *&from, uint16_t kept) {
    __m256 low = spread_eight(from, kept & 0xff);
    return {low, spread_eight(from, kept >> 8)};
}
INLINE void narrow(Lanes x, uint16_t *to, int64_t count) {
    __m256i low = _mm256_srli_epi32(_mm256_castps_si256(x.low), 16);
    __m256i high = _mm256_srli_epi32(_mm256_castps_si256(x.high), 16);
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    if (count >= LANES) {
        _mm256_storeu_si256((__m256i *)to, halves);
        return;
    }
    uint16_t whole[LANES];
    _mm256_storeu_si256((__m256i *)whole, halves);
    memcpy(to, whole, count * sizeof *to);
}

// The weight of each code of a group: s (q - z), rounded to bfloat16; its bytes apart, since shuffles look up bytes. Of
// the groups of two times sixteen columns, in the halves of a register.
struct Tables {
    __m256i upper, lower;
    INLINE void fill(float low_scale, int low_zero, float high_scale, int high_zero) {
        __m256 scale = _mm256_set_m128(_mm_set1_ps(high_scale), _mm_set1_ps(low_scale));
        __m256 zero = _mm256_set_m128(_mm_set1_ps((float)high_zero), _mm_set1_ps((float)low_zero));
        // Upper halves of lanes: the bfloat16 weights of codes q, q + 2, q + 4, q + 6.
        auto four = [&](float q) __attribute__((always_inline)) {
            __m256 codes = _mm256_setr_ps(q, q + 2, q + 4, q + 6, q, q + 2, q + 4, q + 6);
            __m256i bits = _mm256_castps_si256(_mm256_mul_ps(scale, _mm256_sub_ps(codes, zero)));
            __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        };
        auto apart = [&](float q) __attribute__((always_inline)) {  // of eight codes: lower bytes, then upper ones
            __m256i eight = _mm256_blend_epi16(_mm256_srli_epi32(four(q), 16), four(q + 1), 0xaa);
            return _mm256_shuffle_epi8(eight, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
        };
        __m256i first = apart(0), last = apart(8);
        lower = _mm256_unpacklo_epi64(first, last), upper = _mm256_unpackhi_epi64(first, last);
    }
    INLINE Tables both(int i) const {
        return i ? Tables{_mm256_permute2x128_si256(upper, upper, 0x11), _mm256_permute2x128_si256(lower, lower, 0x11)}
                 : Tables{_mm256_permute2x128_si256(upper, upper, 0), _mm256_permute2x128_si256(lower, lower, 0)};
    }
};

// Codes a byte each carry a mark, so that a lane without one, whose shuffle writes 0, can be told from the code 0.
constexpr char MARK = (char)Places::NONE;

INLINE __m128i spread_eight(const uint8_t *&from, uint8_t kept) {
    __m128i eight = _mm_loadl_epi64((const __m128i *)from);
    from += _mm_popcnt_u32(kept);
    return _mm_shuffle_epi8(eight, _mm_loadl_epi64((const __m128i *)places.bytes[kept]));
}

// Lanes of columns 0-7 of both sixteens, then of columns 8-15: those of even columns and of odd ones in a register each,
// the first sixteen's in its lower half. So nothing crosses lanes, and no shuffle is half empty.
struct Codes {
    __m256i eight[2];  // bfloat16 weights
    INLINE void look_up(__m256i codes, const Tables &tables) {
        __m256i lower = _mm256_shuffle_epi8(tables.lower, codes), upper = _mm256_shuffle_epi8(tables.upper, codes);
        eight[0] = _mm256_unpacklo_epi8(lower, upper), eight[1] = _mm256_unpackhi_epi8(lower, upper);
    }
    INLINE void read(const uint8_t *from, const Tables &tables) {  // two a byte, one of each sixteen
        __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from));
        __m256i apart = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        look_up(_mm256_and_si256(apart, _mm256_set1_epi8(15)), tables);
    }
    INLINE void spread(const uint8_t *&from, uint32_t kept, const Tables &tables) {  // a byte each
        __m128i a = spread_eight(from, kept & 0xff), b = spread_eight(from, kept >> 8 & 0xff);
        __m128i c = spread_eight(from, kept >> 16 & 0xff), d = spread_eight(from, kept >> 24);
        __m256i marked = _mm256_set_m128i(_mm_unpacklo_epi64(c, d), _mm_unpacklo_epi64(a, b));
        look_up(_mm256_xor_si256(marked, _mm256_set1_epi8(MARK)), tables);
    }
    INLINE Lanes lanes(int i) const {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(eight[i], 16)),
                _mm256_castsi256_ps(_mm256_and_si256(eight[i], _mm256_set1_epi32((int)0xffff0000)))};
    }
};
INLINE void arrange(Lanes low, Lanes high, float *to) {
    auto eight = [](__m256 a, __m256 b, float *to) __attribute__((always_inline)) {
        __m256 first = _mm256_permute2f128_ps(a, b, 0x20), last = _mm256_permute2f128_ps(a, b, 0x31);
        store(to, {_mm256_shuffle_ps(first, last, 0x88), _mm256_shuffle_ps(first, last, 0xdd)});
    };
    eight(low.low, high.low, to), eight(low.high, high.high, to + LANES);
}
INLINE void narrow(Lanes x, int i, uint16_t *low, uint16_t *high) {
    __m256i halves = _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(x.low), 16), _mm256_castps_si256(x.high));
    _mm_storeu_si128((__m128i *)(low + 8 * i), _mm256_castsi256_si128(halves));
    _mm_storeu_si128((__m128i *)(high + 8 * i), _mm256_extracti128_si256(halves, 1));
}

INLINE void unpack64(const uint8_t *from, uint8_t *to) {  // 64 codes, two a byte, low one first, to a byte each
    for (int i = 0; i < 2; i++) {
        __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(from + 16 * i)));
        w = _mm256_and_si256(_mm256_or_si256(w, _mm256_slli_epi16(w, 4)), _mm256_set1_epi8(15));
        _mm256_storeu_si256((__m256i *)(to + 32 * i), _mm256_or_si256(w, _mm256_set1_epi8(MARK)));
    }
}

#endif

}  // namespace
