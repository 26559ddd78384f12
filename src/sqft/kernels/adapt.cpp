// The weight that an adapter makes of its base, W' or Q', in the ordered arithmetic of sqft/core/ordered.py and
// sqft/core/delta.py: for each weight the low-rank sum from r = 0 up, one rounded product and one rounded sum at a time.
// One pass: the base is read once and the result is written once.
//
// Plain C at the border: sqft/kernels/adapt.py has this file built and calls it through ctypes. Vectors are the
// compiler's own (GCC and Clang), so any processor runs it. It must be built with -ffp-contract=off: a fused product
// and sum would be rounded once.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"

namespace {

// TALL rows of VECTORS vectors: as many sums as stay in registers, beside what is multiplied.
#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 2;
#endif
constexpr int TALL = 4, WIDE = 64;  // a tile

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

enum Type : int64_t { NONE, BF16, FP32, BYTE };

}  // namespace

extern "C" struct Adapted {
    int64_t rows, columns, rank;
    const float *a;       // [ceil(columns / WIDE), rank, WIDE], scaled, filled up with zeros
    const float *b;       // [rows, rank]
    const uint8_t *mask;  // a bit a weight, [rows, ceil(columns / 8)], or null: all are adapted
    // A float base, or null.
    const void *weight;
    int64_t weight_type;
    // A quantised base: codes in planes of `width` bits as pack_codes of sqft/core/grid.py lays them.
    const uint8_t *codes;
    int64_t codes_row, width, top, groups;
    const float *scale;   // [rows, groups]
    const uint8_t *zero;  // [rows, groups]
    const void *start;    // int8 offsets or floats [rows, columns], or null: the codes
    int64_t start_type;
    // What is wanted: [rows, columns].
    void *out;
    int64_t out_type;  // BYTE: codes
    uint8_t *inside;   // a byte a weight: 1 where the sum was not clamped; or null
};

namespace {

inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t narrowed(float value) {  // to bfloat16, nearest even, as PyTorch does
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

inline void read(const void *from, int64_t type, int64_t at, int64_t count, float *to) {
    if (type == BF16)
        for (int64_t i = 0; i < count; i++) to[i] = widened(((const uint16_t *)from)[at + i]);
    else if (type == FP32)
        memcpy(to, (const float *)from + at, 4 * count);
    else
        for (int64_t i = 0; i < count; i++) to[i] = ((const int8_t *)from)[at + i];
}

inline void write(const float *from, int64_t type, int64_t at, int64_t count, void *to) {
    if (type == BF16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[at + i] = narrowed(from[i]);
    else if (type == FP32)
        memcpy((float *)to + at, from, 4 * count);
    else
        for (int64_t i = 0; i < count; i++) ((uint8_t *)to)[at + i] = (uint8_t)from[i];
}

inline void read_codes(const Adapted &p, int64_t o, int64_t at, int64_t count, float *to) {
    const uint8_t low = (1 << p.width) - 1;
    for (int64_t j = 0; j < count;) {
        const int64_t shift = (at + j) / p.codes_row * p.width, place = (at + j) % p.codes_row;
        const int64_t run = std::min(count - j, p.codes_row - place);
        const uint8_t *bytes = p.codes + o * p.codes_row + place;
        for (int64_t i = 0; i < run; i++) to[j + i] = (bytes[i] >> shift) & low;
        j += run;
    }
}

// The bits of each byte, a byte each.
struct Spread {
    uint8_t of[256][8] = {};
    constexpr Spread() {
        for (int byte = 0; byte < 256; byte++)
            for (int bit = 0; bit < 8; bit++) of[byte][bit] = byte >> bit & 1;
    }
};
constexpr Spread bits_of;

inline void spread(const uint8_t *bits, int64_t count, uint8_t *to) {  // up to seven bytes more
    for (int64_t i = 0; i < count; i += 8) memcpy(to + i, bits_of.of[bits[i / 8]], 8);
}

// sums[t][j] = the ordered low-rank sum of row o + t, column at + j. All loops but that of r are unrolled, and nothing takes
// the sums' address: else GCC keeps them in memory, several times slower.
template <int tall>
inline void low_rank(const Adapted &p, int64_t o, int64_t at, float (*sums)[WIDE]) {
    const float *b = p.b + o * p.rank;
    for (int part = 0; part < WIDE; part += LANES * VECTORS) {
        Vector total[tall][VECTORS] = {};
        const float *a = p.a + at * p.rank + part;
        for (int64_t r = 0; r < p.rank; r++, a += WIDE) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                Vector column = *(const Vector *)(a + LANES * v);
#pragma GCC unroll 4
                for (int t = 0; t < tall; t++) total[t][v] = total[t][v] + b[t * p.rank + r] * column;
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < tall; t++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) *(Vector *)(sums[t] + part + LANES * v) = total[t][v];
    }
}

// What a row of a quantised base has in each column of a tile, as numbers.
struct Grid {
    float scale[WIDE], inverse[WIDE], low[WIDE], start[WIDE];
};

inline void read_grid(const Adapted &p, int64_t o, int64_t at, int64_t count, Grid &g) {
    const int64_t group = p.columns / p.groups;
    for (int64_t j = 0; j < count;) {
        const int64_t k = (at + j) / group, stop = std::min(count, (k + 1) * group - at);
        const float scale = p.scale[o * p.groups + k], zero = p.zero[o * p.groups + k], inverse = 1.0f / scale;
        for (; j < stop; j++) g.scale[j] = scale, g.inverse[j] = inverse, g.low[j] = -zero;
    }
    if (p.start_type == BF16 || p.start_type == FP32) {
        read(p.start, p.start_type, o * p.columns + at, count, g.start);
        for (int64_t j = 0; j < count; j++) g.start[j] = g.start[j] / g.scale[j];
        return;
    }
    read_codes(p, o, at, count, g.start);
    for (int64_t j = 0; j < count; j++) g.start[j] = g.start[j] + g.low[j];
    if (p.start_type == BYTE) {
        const int8_t *offset = (const int8_t *)p.start + o * p.columns + at;
        for (int64_t j = 0; j < count; j++) g.start[j] = g.start[j] + offset[j] * (1.0f / 256);
    }
}

inline void on_grid(const Adapted &p, int64_t o, int64_t at, int64_t count, const float *sums, const uint8_t *kept) {
    Grid g;
    read_grid(p, o, at, count, g);
    const float top = (float)p.top, even = 12582912.0f;  // 1.5 * 2^23: a sum with it rounds to nearest, ties to even
    float found[WIDE];
    uint8_t inside[WIDE];
    for (int64_t j = 0; j < count; j++) {
        float delta = kept[j] ? sums[j] : 0.0f;
        float position = g.start[j] + delta * g.inverse[j], low = g.low[j], high = top + low;
        // One step beyond the grid rounds as anything beyond does, and stays where `even` is exact.
        position = position < low - 1 ? low - 1 : position;
        position = position > high + 1 ? high + 1 : position;
        float rounded = (position + even) - even;
        float clamped = rounded < low ? low : rounded;
        clamped = clamped > high ? high : clamped;
        inside[j] = rounded == clamped;
        found[j] = p.out_type == BYTE ? clamped - low : (clamped + 0.0f) * g.scale[j];
    }
    write(found, p.out_type, o * p.columns + at, count, p.out);
    if (p.inside) memcpy(p.inside + o * p.columns + at, inside, count);
}

inline void on_floats(const Adapted &p, int64_t o, int64_t at, int64_t count, const float *sums, const uint8_t *kept) {
    float weight[WIDE];
    read(p.weight, p.weight_type, o * p.columns + at, count, weight);
    for (int64_t j = 0; j < count; j++) {
        float sum = sums[j] + weight[j];
        weight[j] = kept[j] ? sum : weight[j];
    }
    write(weight, p.out_type, o * p.columns + at, count, p.out);
}

void adapt_rows(const void *job, int64_t begin, int64_t end) {
    const Adapted &p = *(const Adapted *)job;
    const int64_t mask_row = (p.columns + 7) / 8;
    float sums[TALL][WIDE] = {};
    uint8_t kept[WIDE];
    memset(kept, 1, WIDE);
    for (int64_t o = begin; o < end; o += TALL) {
        const int tall = (int)std::min<int64_t>(TALL, end - o);
        for (int64_t at = 0; at < p.columns; at += WIDE) {
            const int64_t count = std::min<int64_t>(WIDE, p.columns - at);
            if (p.rank > 0 && tall == TALL) low_rank<TALL>(p, o, at, sums);
            else if (p.rank > 0)
                for (int t = 0; t < tall; t++) low_rank<1>(p, o + t, at, sums + t);
            for (int t = 0; t < tall; t++) {
                if (p.mask) spread(p.mask + (o + t) * mask_row + at / 8, count, kept);
                if (p.codes) on_grid(p, o + t, at, count, sums[t], kept);
                else on_floats(p, o + t, at, count, sums[t], kept);
            }
        }
    }
}

struct Masked {
    void *values;
    int64_t size, columns;
    const uint8_t *mask, *inside;
};

template <class Number>
void mask_rows(const void *job, int64_t begin, int64_t end) {
    const Masked &p = *(const Masked *)job;
    std::vector<uint8_t> kept(p.columns + 8, 1);
    for (int64_t o = begin; o < end; o++) {
        Number *row = (Number *)p.values + o * p.columns;
        const uint8_t *inside = p.inside ? p.inside + o * p.columns : kept.data();
        if (p.mask) spread(p.mask + o * ((p.columns + 7) / 8), p.columns, kept.data());
        for (int64_t i = 0; i < p.columns; i++) row[i] &= -(Number)(kept[i] & inside[i]);
    }
}

}  // namespace

extern "C" {

void sqft_adapt(const Adapted *p, int64_t threads) { share(adapt_rows, p, p->rows, threads); }

// values [rows, columns], 2 or 4 bytes each, become 0 where mask or inside is; either may be null.
void sqft_mask(void *values, int64_t size, int64_t rows, int64_t columns, const uint8_t *mask, const uint8_t *inside,
               int64_t threads) {
    Masked job{values, size, columns, mask, inside};
    share(size == 2 ? mask_rows<uint16_t> : mask_rows<uint32_t>, &job, rows, threads);
}
}
