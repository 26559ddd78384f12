// Products of a few rows of x with a weight that stays as it is stored: BF16 or 4-bit codes, dense or with zeros of a
// bit each. One loop serves the four: a form turns its bytes into float32 weights, sixteen at a time (lanes.h), and the
// loop multiplies and adds them in float32. The weights are those of the dequantised model, to the bit; so a form also
// writes the weight out, for products of many rows. Sums are added in one order, whatever the number of threads.
//
// Plain C at the border: sqft/kernels/decode.py has this file built and calls it through ctypes. Needs AVX2, FMA, F16C
// and BMI2; takes AVX-512 F, BW, VL and DQ where it is built for them. Reads up to 64 bytes beyond a sparse form's values.

#include "lanes.h"

#include <cstdlib>

#include "threads.h"

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

constexpr int MOST = 8;       // rows of x at a time
constexpr int WIDEST = 1024;  // columns that are unpacked at a time, of sparse codes
enum { BF16, FP16, FP32 };

// Ask for bytes long before they are read: the processor's own guesses end at a page and know nothing of the next row.
INLINE void ask(const void *place) { _mm_prefetch((const char *)place + 4096, _MM_HINT_T0); }

INLINE float number(const void *place, int64_t index, int64_t type) {
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

// Scale and zero point of each group, one after the other along a row.
struct Groups {
    const void *scales;
    const uint8_t *zeros;
    int64_t type, group, next, left;  // columns until the next begins
    float scale;
    int zero;

    INLINE Groups(const Weight &w, int64_t row, int64_t column)
        : scales(w.scale), zeros(w.zero), type(w.scale_type), group(w.group),
          next(row * (w.columns / w.group) + column / w.group), left(column % w.group ? w.group - column % w.group : 0) {
        if (left) read();
    }
    INLINE void read() {
        zero = zeros[next];
        scale = number(scales, next++, type);
    }
    INLINE void begin() {  // the next, if its time has come
        if (left == 0) read(), left = group;
    }
};

// Tables and codes that are made before their use, for one row.
constexpr int RUNS = WIDEST / (2 * LANES);
constexpr int CODE_WAYS = SUMS > 4 ? 2 : 1;  // tables take registers too
struct Room {
    Tables tables[RUNS];
    alignas(64) uint8_t codes[WIDEST + 64];
};

// Forms. `begin` makes ready for the b-th block and says up to which one it did. `chunk` gives the i-th sixteen weights
// of a block; all are asked for, in order. `put` writes them into the row of the weight in bfloat16. Those of codes are no
// neighbours: x is arranged as they are.

template <class Form>
INLINE int64_t place(int64_t b, int i) { return LANES * (Form::chunks * b + i); }

struct Neighbours {
    static constexpr int chunks = 4, ways = 2;
    INLINE int64_t begin(int64_t, int64_t blocks) { return blocks; }
    INLINE void put(Lanes x, int64_t b, int i, uint16_t *to, int64_t columns) const {
        const int64_t at = place<Neighbours>(b, i);
        narrow(x, to + at, columns - at);
    }
};

struct DenseBF16 : Neighbours {
    const uint16_t *row;
    int64_t columns;
    INLINE DenseBF16(const Weight &w, int64_t o, Room &) : row((const uint16_t *)w.values + o * w.columns), columns(w.columns) {}
    INLINE Lanes chunk(int64_t b, int i, bool whole) {
        int64_t at = place<DenseBF16>(b, i);
        if (i % 2 == 0) ask(row + at);
        return whole ? widened(row + at) : widened(row + at, columns - at);
    }
};

struct SparseBF16 : Neighbours {
    const uint16_t *mask;
    const uint16_t *value;
    INLINE SparseBF16(const Weight &w, int64_t o, Room &)
        : mask((const uint16_t *)(w.mask + o * ((w.columns + 63) / 64))),
          value((const uint16_t *)w.values + (o ? w.ends[o - 1] : 0)) {}
    INLINE Lanes chunk(int64_t b, int i, bool) {
        if (i == 0) ask(value);
        return spread(value, mask[chunks * b + i]);
    }
};

// Tables of the next runs of blocks, each within a group, are made together: that is half of the work, and one table alone
// would wait for each of its steps.

// Byte j of a row of codes holds columns j (low half) and width + j, see sqft.core.grid.pack_codes.
struct DenseINT4 {
    static constexpr int chunks = 2, ways = CODE_WAYS;
    const uint8_t *row;
    int64_t width;
    Groups low, high;
    Room &room;
    int64_t ends[RUNS];
    int next = RUNS;
    Tables tables;
    Codes codes;
    INLINE DenseINT4(const Weight &w, int64_t o, Room &room)
        : row(w.values + o * (w.columns / 2)), width(w.columns / 2), low(w, o, 0), high(w, o, w.columns / 2), room(room) {}
    INLINE void make(int64_t b, int64_t blocks) {
        Groups first = low, second = high;  // which no store below can change
        for (int i = 0; i < RUNS && b < blocks; i++) {
            first.begin(), second.begin();
            room.tables[i].fill(first.scale, first.zero, second.scale, second.zero);
            const int64_t columns = first.left < second.left ? first.left : second.left;
            first.left -= columns, second.left -= columns;
            ends[i] = b += columns / LANES;
        }
        low = first, high = second, next = 0;
    }
    INLINE int64_t begin(int64_t b, int64_t blocks) {
        if (next == RUNS) make(b, blocks);
        tables = room.tables[next];
        const int64_t end = ends[next++];
        for (int64_t i = b; i < end; i += 4) ask(row + LANES * i);
        return end;
    }
    INLINE Lanes chunk(int64_t b, int i, bool) {
        if (i == 0) codes.read(row + LANES * b, tables);
        return codes.lanes(i);
    }
    INLINE void put(Lanes x, int64_t b, int i, uint16_t *to, int64_t) const {
        narrow(x, i, to + LANES * b, to + width + LANES * b);
    }
};

// Codes of the kept weights in order, two a byte, the low one first; those of a group begin at a whole byte. The codes
// of a stretch are laid out a byte each; then columns take theirs from there, as many as the mask has.
// Far enough behind: a load of what was just stored in other portions would wait.
struct SparseINT4 {
    static constexpr int chunks = 2, ways = CODE_WAYS;
    static constexpr int BLOCK = 2 * LANES;
    const uint64_t *mask;
    const uint8_t *values;
    const uint8_t *code;
    int64_t columns;  // left
    Groups groups;
    Room &room;
    int next = 0;
    Tables tables;
    Codes codes;
    INLINE SparseINT4(const Weight &w, int64_t o, Room &room)
        : mask(w.mask + o * ((w.columns + 63) / 64)), values(w.values + (o ? w.ends[o - 1] : 0)), columns(w.columns),
          groups(w, o, 0), room(room) {}
    INLINE void unpack(const uint64_t *words, int64_t count) {
        const int64_t group = groups.group;
        const uint8_t *from = values;
        uint8_t *to = room.codes;
        code = to;
        auto lay = [&](uint64_t kept) __attribute__((always_inline)) {
            ask(from), unpack64(from, to);
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
    INLINE void make(int64_t stretch) {  // of so many columns
        Groups all = groups;  // which no store below can change
        for (int i = 0; i * all.group < stretch; i += 2) {
            all.read();
            const float scale = all.scale;
            const int zero = all.zero;
            if ((i + 1) * all.group < stretch) all.read();
            Tables two;
            two.fill(scale, zero, all.scale, all.zero);
            if (all.group < BLOCK) room.tables[i / 2] = two;
            else room.tables[i] = two.both(0), room.tables[i + 1] = two.both(1);
        }
        groups = all, next = 0;
    }
    INLINE int64_t begin(int64_t b, int64_t) {
        if (b % (WIDEST / BLOCK) == 0) {
            const int64_t stretch = columns < WIDEST ? columns : WIDEST;
            unpack(mask + b / 2, (stretch + 63) / 64), make(stretch);
            columns -= stretch;
        }
        tables = room.tables[next++];
        return b + (groups.group < BLOCK ? 1 : groups.group / BLOCK);
    }
    INLINE Lanes chunk(int64_t b, int i, bool) {
        if (i == 0) codes.spread(code, ((const uint32_t *)mask)[b], tables);
        return codes.lanes(i);
    }
    INLINE void put(Lanes x, int64_t b, int i, uint16_t *to, int64_t) const {
        narrow(x, i, to + BLOCK * b, to + BLOCK * b + LANES);
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
    const float *x;  // [count or more, stride], arranged as the form's weights, zeros behind the columns
    int64_t stride, count;
    const void *bias;
    void *y;  // [count, rows]
    int64_t type;
};

void store(const Product &p, int64_t t, int64_t o, float sum) {
    if (p.bias) sum += number(p.bias, o, p.type);
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
__attribute__((noinline)) void multiply(const Product &p, int64_t t0, int64_t o) {
    // Sums of a result: one alone would wait for each addition. Not a matter of R: threads part rows, and not results.
    constexpr int WAYS = T > 1 ? 1 : Form::ways;
    const float *x = p.x + t0 * p.stride;
    const int64_t blocks = whole_blocks<Form>(p.w);
    Room room[R];
    Form one(p.w, o, room[0]), two(p.w, o + R - 1, room[R - 1]);
    Lanes sum[R][WAYS][T];
    for (int r = 0; r < R; r++)
        for (int k = 0; k < WAYS; k++)
            for (int t = 0; t < T; t++) sum[r][k][t] = zeros();
    // Unrolled, so that sums and tables stay in registers; the compiler alone leaves the loops.
    auto add_block = [&](int64_t b, int n, bool whole) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            Lanes weight[R];
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) weight[r] = (r ? two : one).chunk(b, i, whole);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                Lanes part = load(x + t * p.stride + place<Form>(b, i));
#pragma GCC unroll 2
                for (int r = 0; r < R; r++) sum[r][i % WAYS][t] = multiply_add(weight[r], part, sum[r][i % WAYS][t]);
            }
        }
    };
    for (int64_t b = 0; b < blocks;) {
        int64_t end = one.begin(b, blocks);
        if (R > 1) two.begin(b, blocks);
        for (; b < end; b++) add_block(b, Form::chunks, true);
    }
    if (int rest = rest_chunks<Form>(p.w)) add_block(blocks, rest, false);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T && t0 + t < p.count; t++) {
            for (int k = 1; k < WAYS; k++) sum[r][0][t] = add(sum[r][0][t], sum[r][k][t]);
            store(p, t0 + t, o + r, total(sum[r][0][t]));
        }
}

template <class Form, int T>
void multiply_tile(const Product &p, int64_t t0, int64_t begin, int64_t end) {
    constexpr int TOGETHER = T < SUMS ? T : SUMS, R = 2 * TOGETHER <= SUMS ? 2 : 1;
    int64_t o = begin;
    for (; o + R <= end; o += R)
        for (int t = 0; t < T; t += TOGETHER) multiply<Form, R, TOGETHER>(p, t0 + t, o);
    for (; o < end; o++)
        for (int t = 0; t < T; t += TOGETHER) multiply<Form, 1, TOGETHER>(p, t0 + t, o);
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
        Room room;
        Form form(p.w, o, room);
        auto write_block = [&](int64_t b, int n, bool whole) __attribute__((always_inline)) {
            for (int i = 0; i < n; i++) form.put(form.chunk(b, i, whole), b, i, p.out + o * columns, columns);
        };
        for (int64_t b = 0; b < blocks;)
            for (int64_t end = form.begin(b, blocks); b < end; b++) write_block(b, Form::chunks, true);
        if (rest) write_block(blocks, rest, false);
    }
}

enum { DENSE_BF16, SPARSE_BF16, DENSE_INT4, SPARSE_INT4 };
const Rows MULTIPLY[] = {multiply_rows<DenseBF16>, multiply_rows<SparseBF16>, multiply_rows<DenseINT4>,
                         multiply_rows<SparseINT4>};
const Rows WRITE[] = {write_rows<DenseBF16>, write_rows<SparseBF16>, write_rows<DenseINT4>, write_rows<SparseINT4>};

}  // namespace

extern "C" {

int sqft_supported() {
    __builtin_cpu_init();
#ifdef __AVX512F__
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return 0;
#endif
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
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
        auto given = [&](int64_t i) __attribute__((always_inline)) {
            return type == FP32 ? load((const float *)x + t * w->columns + i) : widened((const uint16_t *)x + t * w->columns + i);
        };
        const bool halves = w->form == DENSE_INT4;  // sixteen columns and those that many columns behind them
        if (halves || w->form == SPARSE_INT4)
            for (int64_t i = 0; i < w->columns / 2; i += LANES)
                arrange(given(halves ? i : 2 * i), given(halves ? w->columns / 2 + i : 2 * i + LANES), to + 2 * i);
        else if (type == FP32)
            memcpy(to, (const float *)x + t * w->columns, w->columns * sizeof(float));
        else
            for (int64_t i = 0; i < w->columns; i += LANES)
                store(to + i, widened((const uint16_t *)x + t * w->columns + i, w->columns - i));
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
