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

    void align() {
        if (N == 4) at += at & 1;
    }
    void put(uint64_t word, int count) {
        uint8_t *to = values + at * N / 8;
        if (N == 4) {
            const int half = (at & 1) * 4;
            uint64_t shifted = word << half | (*to & ((1 << half) - 1));
            memcpy(to, &shifted, 8);
            to[8] = (uint8_t)(word >> 60 >> (4 - half));
        } else {
            memcpy(to, &word, 8);
        }
        at += count;
    }
    uint64_t get(int count) {
        const int64_t byte = at * N / 8;
        uint64_t word = load(values + byte, size - byte);
        if (N == 4) {
            const uint64_t odd = at & 1, next = load(values + byte + 8, size - byte - 8 < 1 ? 0 : 1);
            word = word >> 4 * odd | (next << 60 & -odd);
        }
        at += count;
        return word;
    }
};

// Calls f(row's bytes from here on, how many are left of them, the word of zeros, mask word, its bit), word by word, and
// `aligned` where a group begins.
template <int N, class F, class G>
inline void each(const Matrix &m, F f, G aligned) {
    const int64_t bytes = m.columns * N / 8, words = (bytes + 7) / 8, mask_words = (m.columns + 63) / 64;
    const uint8_t *zero = m.zero;
    for (int64_t o = 0; o < m.rows; o++) {
        uint8_t *row = m.bytes + o * bytes;
        uint64_t *mask = m.mask + o * mask_words, zeros = 0;
        for (int64_t i = 0, left = 0; i < words; i++, left -= Lanes<N>::count) {
            if (left == 0) {
                left = m.group;
                if (zero) zeros = *zero++ * Lanes<N>::ones;
                aligned();
            }
            f(row + 8 * i, bytes - 8 * i, zeros, mask + i / N, i % N * Lanes<N>::count);
        }
    }
}

template <int N>
void mark(const Matrix &m) {
    each<N>(
        m,
        [](const uint8_t *from, int64_t left, uint64_t zeros, uint64_t *mask, int bit) {
            *mask |= Lanes<N>::not_zero(load(from, left) ^ zeros) << bit;
        },
        [] {});
}

template <int N>
void compress(const Matrix &m) {
    Values<N> values{m.values, m.size};
    each<N>(
        m,
        [&](const uint8_t *from, int64_t left, uint64_t, const uint64_t *mask, int bit) {
            const uint64_t kept = *mask >> bit & ((1ull << Lanes<N>::count) - 1);
            values.put(_pext_u64(load(from, left), Lanes<N>::all_of(kept)), (int)_mm_popcnt_u64(kept));
        },
        [&] { values.align(); });
}

template <int N>
void expand(const Matrix &m) {
    Values<N> values{m.values, m.size};
    each<N>(
        m,
        [&](uint8_t *to, int64_t left, uint64_t zeros, const uint64_t *mask, int bit) {
            const uint64_t kept = *mask >> bit & ((1ull << Lanes<N>::count) - 1), lanes = Lanes<N>::all_of(kept);
            uint64_t word = _pdep_u64(values.get((int)_mm_popcnt_u64(kept)), lanes) | (zeros & ~lanes);
            if (left >= 8) memcpy(to, &word, 8);
            else memcpy(to, &word, left);
        },
        [&] { values.align(); });
}

}  // namespace

#define FOR_WIDTH(name)                                \
    void sqft_##name(const Matrix *m) {                \
        if (m->bits == 4) name<4>(*m);                 \
        else if (m->bits == 8) name<8>(*m);            \
        else if (m->bits == 16) name<16>(*m);          \
        else name<32>(*m);                             \
    }

extern "C" {

int sqft_supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

FOR_WIDTH(mark)      // the mask, zero before, gets a bit for each lane that is not zero
FOR_WIDTH(compress)  // the values are those that the mask keeps
FOR_WIDTH(expand)    // the bytes are the values where the mask keeps them, and zeros elsewhere
}
