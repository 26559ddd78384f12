// Sparse layouts of a matrix of integers of 4, 8, 16 or 32 bits (sqft/core/sparse.py), eight bytes of a row at a time:
// PEXT moves a word's kept lanes together, PDEP moves them apart. Plain C at the border, called through ctypes by
// sqft/kernels/sparse.py. Needs BMI2.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

extern "C" struct Matrix {
    int64_t bits, rows, columns;
    int64_t group;        // columns that share a zero, and of which 4-bit values begin at a whole byte; whole words
    const uint8_t *zero;  // [rows, columns / group]; none: zeros are 0
    uint8_t *bytes;       // [rows, columns * bits / 8]
    uint64_t *mask;       // [rows, ceil(columns / 64)]
    uint8_t *values;      // the kept ones in order, with room for 9 bytes more where they are written
    int64_t size;         // bytes of the values
};

namespace {

template <int N>
struct Lanes {
    static constexpr int count = 64 / N;
    static constexpr uint64_t full = (1ull << N) - 1, ones = ~0ull / full;

    static uint64_t not_zero(uint64_t word) {  // a bit a lane
        for (int shift = 1; shift < N; shift *= 2) word |= word >> shift;
        return _pext_u64(word, ones);
    }
    static uint64_t all_of(uint64_t bits) { return _pdep_u64(bits, ones) * full; }
};

inline uint64_t load(const uint8_t *from, int64_t left) {
    uint64_t word = 0;
    if (left >= 8) memcpy(&word, from, 8);
    else if (left > 0) memcpy(&word, from, left);
    return word;
}

// Values one after the other, `at` counted in lanes. Those of 4 bits may begin in the middle of a byte.
template <int N>
struct Values {
    uint8_t *values;
    int64_t size, at = 0;
    uint64_t low = 0;  // of the byte that the next value of 4 bits shares

    void align() {
        if (N == 4) at += at & 1, low = 0;
    }
    void put(uint64_t word, int64_t count) {
        uint8_t *to = values + at * N / 8;
        if (N == 4) {
            const int half = 4 * (at & 1);
            const uint64_t shared = word << half | low, last = word >> ((4 * count - 4) & 63) & 15;
            memcpy(to, &shared, 8);
            to[8] = (uint8_t)(word >> 60 >> (4 - half));
            low = (count ? last : low) & -((at + count) & 1);
        } else {
            memcpy(to, &word, 8);
        }
        at += count;
    }
    uint64_t get(int64_t count) {
        const int64_t byte = at * N / 8;
        uint64_t word = load(values + byte, size - byte);
        if (N == 4) {
            const int odd = at & 1;
            word >>= 4 * odd;
            if (odd && count == 16 && size - byte > 8) word |= (uint64_t)values[byte + 8] << 60;
        }
        at += count;
        return word;
    }
};

// Calls f(row's bytes from here on, how many are left of them, the word of zeros, its lanes' bits of the mask from here on)
// word by word, and `aligned` where a group begins. What f adds to the mask is stored.
template <int N, class F, class G>
inline void each(const Matrix &m, F f, G aligned) {
    const int64_t bytes = m.columns * N / 8, words = (bytes + 7) / 8, mask_words = (m.columns + 63) / 64;
    const uint8_t *zero = m.zero;
    uint8_t *row = m.bytes;
    uint64_t *mask = m.mask;
    for (int64_t o = 0; o < m.rows; o++, row += bytes, mask += mask_words) {
        uint64_t zeros = 0;
        int64_t left = 0;
        auto step = [&](int64_t i, int64_t rest, uint64_t &bits) __attribute__((always_inline)) {
            if (left == 0) {
                left = m.group;
                if (zero) zeros = *zero++ * Lanes<N>::ones;
                aligned();
            }
            left -= Lanes<N>::count;
            f(row + 8 * i, rest, zeros, bits, (int)(i % N) * Lanes<N>::count);
        };
        for (int64_t w = 0; w < mask_words; w++) {
            uint64_t bits = mask[w];
            if (8 * N * (w + 1) <= bytes)
#pragma GCC unroll 4
                for (int i = 0; i < N; i++) step(N * w + i, 8, bits);
            else
                for (int64_t i = N * w; i < words && i < N * (w + 1); i++) step(i, bytes - 8 * i, bits);
            mask[w] = bits;
        }
    }
}

template <int N>
uint64_t kept(uint64_t bits, int bit) {
    return bits >> bit & ((1ull << Lanes<N>::count) - 1);
}

template <int N>
void mark(const Matrix &m) {
    each<N>(
        m,
        [](const uint8_t *from, int64_t left, uint64_t zeros, uint64_t &bits, int bit) __attribute__((always_inline)) {
            bits |= Lanes<N>::not_zero(load(from, left) ^ zeros) << bit;
        },
        [] {});
}

template <int N>
void compress(const Matrix &m) {
    Values<N> values{m.values, m.size};
    each<N>(
        m,
        [&](const uint8_t *from, int64_t left, uint64_t, uint64_t &bits, int bit) __attribute__((always_inline)) {
            const uint64_t here = kept<N>(bits, bit);
            values.put(_pext_u64(load(from, left), Lanes<N>::all_of(here)), _mm_popcnt_u64(here));
        },
        [&] { values.align(); });
}

template <int N>
void expand(const Matrix &m) {
    Values<N> values{m.values, m.size};
    each<N>(
        m,
        [&](uint8_t *to, int64_t left, uint64_t zeros, uint64_t &bits, int bit) __attribute__((always_inline)) {
            const uint64_t here = kept<N>(bits, bit), lanes = Lanes<N>::all_of(here);
            const uint64_t word = _pdep_u64(values.get(_mm_popcnt_u64(here)), lanes) | (zeros & ~lanes);
            memcpy(to, &word, left < 8 ? left : 8);
        },
        [&] { values.align(); });
}

// Whether the bytes are what the values and the mask expand to.
template <int N>
int expands(const Matrix &m) {
    Values<N> values{m.values, m.size};
    uint64_t different = 0;
    each<N>(
        m,
        [&](const uint8_t *from, int64_t left, uint64_t zeros, uint64_t &bits, int bit) __attribute__((always_inline)) {
            const uint64_t here = kept<N>(bits, bit), lanes = Lanes<N>::all_of(here);
            const uint64_t word = _pdep_u64(values.get(_mm_popcnt_u64(here)), lanes) | (zeros & ~lanes);
            different |= word ^ load(from, left);
        },
        [&] { values.align(); });
    return different == 0;
}

// Where in the values each row ends.
void ends(const Matrix &m, int64_t *ends) {
    const int64_t words = (m.columns + 63) / 64;
    int64_t at = 0;
    for (int64_t o = 0; o < m.rows; o++) {
        const uint64_t *mask = m.mask + o * words;
        if (m.bits != 4) {
            for (int64_t w = 0; w < words; w++) at += _mm_popcnt_u64(mask[w]);
        } else {
            for (int64_t i = 0, left = m.group; i < (m.columns + 15) / 16; i++, left -= 16) {
                if (left == 0) left = m.group, at += at & 1;
                at += _mm_popcnt_u64(mask[i / 4] >> i % 4 * 16 & 0xffff);
            }
            at += at & 1;
        }
        ends[o] = m.bits == 4 ? at / 2 : at;
    }
}

}  // namespace

#define FOR_WIDTH(type, name)                          \
    type sqft_##name(const Matrix *m) {                \
        if (m->bits == 4) return name<4>(*m);          \
        if (m->bits == 8) return name<8>(*m);          \
        if (m->bits == 16) return name<16>(*m);        \
        return name<32>(*m);                           \
    }

extern "C" {

int sqft_supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

void sqft_ends(const Matrix *m, int64_t *where) { ends(*m, where); }

// How many bits of a mask are 1.
int64_t sqft_count(const uint64_t *mask, int64_t words) {
    int64_t found = 0;
    for (int64_t i = 0; i < words; i++) found += _mm_popcnt_u64(mask[i]);
    return found;
}

// Whether each four bits have at most two.
int sqft_two_of_four(const uint64_t *mask, int64_t words) {
    for (int64_t i = 0; i < words; i++) {
        const uint64_t pairs = mask[i] - (mask[i] >> 1 & 0x5555555555555555);
        const uint64_t fours = (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333);
        if ((fours + 0x1111111111111111) & 0x4444444444444444) return 0;
    }
    return 1;
}

FOR_WIDTH(void, mark)     // the mask, zero before, gets a bit for each lane that is not zero
FOR_WIDTH(void, compress) // the values are those that the mask keeps
FOR_WIDTH(int, expands)  // whether they do, and what expand would write is there
FOR_WIDTH(void, expand)  // the bytes are the values where the mask keeps them, and zeros elsewhere
}
