/* Moves the elements of weights into the layouts that kernels read, looks for what is not finite, and keeps copies.
 *
 * A batch is a list of moves, made once for a model, and a table of addresses, filled anew for each refit. Moves come
 * in units of about 256 KB, which any number of threads take one by one: `onnx_refit_work` returns when none is left
 * to begin. Nothing is allocated, nothing fails, no thread is made, and nothing but this table is believed: whoever
 * makes the moves has checked that each stays inside its tensors (engine/onnxruntime/moving.py).
 *
 * Plain C with the vector extension of GCC and Clang, for any processor: 4x4 tiles are transposed in registers. Only
 * stores that pass the caches by (SSE2) and the widest registers (x86 Linux) are chosen by platform.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* SCHED_BATCH */
#endif

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDEST
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (integers){__VA_ARGS__})
#endif

#define VERSION 7
#define RANK 6
#define LANES 16
#define WIDE 1024 /* elements in a row that is copied as bytes, and may be looked at meanwhile */
#define FETCHED 8192 /* bytes from what is read to what is fetched meanwhile */

#include "pace.h"

/* The same numbers and fields as in library.py. */
enum { LOOK = 0, ROWS = 1, TILES = 2, WALK = 3, GATHER = 4 };

/* Slots are positions in the table of addresses; offsets and strides are in elements. */
typedef struct {
    int64_t kind;
    int64_t itemsize;
    int64_t target;  /* slot; of a LOOK: where to keep a copy, perhaps nowhere */
    int64_t source;  /* slot; of a LOOK: what to look at, perhaps nothing */
    int64_t factor;  /* slot, or -1 */
    int64_t flag;    /* slot: a byte to set where something is not finite, perhaps none; not of WALK and GATHER */
    int64_t target_offset;
    int64_t source_offset;
    int64_t factor_offset;
    int64_t to;      /* GATHER: address of positions in the target; TILES: of the rows' offsets in it, or 0 */
    int64_t take;    /* GATHER: address of positions in the source; else the exponent bits of its floats, or 0 */
    int64_t lines;   /* whether only whole lines of the cache are written, one after the other: 64 bytes, or halves */
    int64_t dims[RANK];
    int64_t target_strides[RANK];
    int64_t source_strides[RANK];
    int64_t factor_strides[RANK];
} move;

typedef struct {
    const move *moves;
    const int64_t *units; /* unit u is the moves from units[u] to units[u + 1] */
    const uint64_t *addresses;
    int64_t count;  /* of units */
    int64_t stream; /* whether targets are so large that writing them through the caches only empties these */
    int64_t next;   /* the first unit that nobody has begun */
    int64_t done;   /* units that are finished: what they wrote is seen by whoever sees this */
} batch;

typedef float floats __attribute__((vector_size(16)));
typedef int32_t integers __attribute__((vector_size(16)));

/* The memory is of any type, and a checkpoint's tensors may begin at any byte. */
#define ANYWHERE __attribute__((may_alias, aligned(1)))
typedef float ANYWHERE single;

/* The bits of elements, so that a NaN is moved as it is. */
typedef uint16_t ANYWHERE half;
typedef uint32_t ANYWHERE word;
typedef uint64_t ANYWHERE twice;

static inline floats load(const single *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(single *to, floats value, int past) {
#if defined(__SSE2__)
    if (past) {
        _mm_stream_ps(to, (__m128)value);
        return;
    }
#endif
    (void)past;
    memcpy(to, &value, sizeof value);
}

/* Lanes, all bits set, that are not finite: all of their exponent's bits are set. */
static inline integers wrong(floats value, integers exponent) { return ((integers)value & exponent) == exponent; }

static inline int any(integers lanes) { return (lanes[0] | lanes[1] | lanes[2] | lanes[3]) != 0; }

static inline int aligned(const void *address, uintptr_t bytes) { return ((uintptr_t)address & (bytes - 1)) == 0; }

typedef struct {
    int64_t run;            /* elements that lie side by side in the source */
    int64_t t_step;         /* from one of them to the next in the target, or: */
    const int64_t *offsets; /* where each of them goes */
    int64_t s_step;         /* from one lane to the next in the source; side by side in the target */
} tile;

static inline int64_t place(const tile *k, int64_t r) { return k->offsets ? k->offsets[r] : r * k->t_step; }

#include "wide.h"

/* ---- looking ------------------------------------------------------------------------------------------------- */

#define ANY_SET(name, type)                                                              \
    WIDEST static int name(const type *bits, int64_t count, type mask) {                 \
        type found = 0;                                                                  \
        for (int64_t i = 0; i < count; i++) found |= (type)((bits[i] & mask) == mask);   \
        return found != 0;                                                               \
    }
ANY_SET(any_set_1, uint8_t)
ANY_SET(any_set_2, half)
ANY_SET(any_set_4, word)
ANY_SET(any_set_8, twice)

#include "arrays.h"

static void copy(uint8_t *to, const uint8_t *from, size_t bytes, int stream) {
#if defined(__SSE2__)
    if (stream && bytes >= 4096) {
        size_t head = (size_t)(-(uintptr_t)to & 63), body = (bytes - head) & ~(size_t)63;
        memcpy(to, from, head);
        for (size_t i = head; i < head + body; i += 16)
            _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
        memcpy(to + head + body, from + head + body, bytes - head - body);
        return;
    }
#endif
    (void)stream;
    memcpy(to, from, bytes);
}

typedef int16_t shorts __attribute__((vector_size(16)));

/* The same, and whether all bits of `exponent` are set in any of these elements of 2 or 4 bytes. `then` is read next. */
static int copy_looking(
    uint8_t *to, const uint8_t *from, size_t bytes, int64_t size, int64_t exponent, int stream, const uint8_t *then) {
    size_t head = stream ? (size_t)(-(uintptr_t)to & 63) : 0, i;
    if (head > bytes) head = bytes;
    size_t body = (bytes - head) & ~(size_t)63;
    integers found = {0}, wide = {(int32_t)exponent, (int32_t)exponent, (int32_t)exponent, (int32_t)exponent};
    int16_t low = (int16_t)exponent;
    shorts half_found = {0}, halves = {low, low, low, low, low, low, low, low};
    memcpy(to, from, head);
    if (has_wide())
        found[0] = copy_lines(to + head, from + head, body, size, exponent, stream, then);
    else if (size == 4)
        for (i = head; i < head + body; i += 16) {
            floats value = load((const single *)(const void *)(from + i));
            found |= wrong(value, wide);
            store((single *)(void *)(to + i), value, stream);
        }
    else
        for (i = head; i < head + body; i += 16) {
            floats value = load((const single *)(const void *)(from + i));
            half_found |= ((shorts)value & halves) == halves;
            store((single *)(void *)(to + i), value, stream);
        }
    memcpy(to + head + body, from + head + body, bytes - head - body);
    found |= (integers)half_found;
    if (any(found)) return 1;
    for (size_t part = 0; part < 2; part++) {
        const uint8_t *at = part ? from + head + body : from;
        int64_t count = (int64_t)(part ? bytes - head - body : head) / size;
        if (size == 4 ? any_set_4((const word *)at, count, (word)exponent) : any_set_2((const half *)at, count, (half)exponent))
            return 1;
    }
    return 0;
}

static void look(const move *m, const uint64_t *addresses, int stream) {
    const uint8_t *from = (const uint8_t *)(uintptr_t)addresses[m->source];
    uint8_t *flag = (uint8_t *)(uintptr_t)addresses[m->flag];
    uint8_t *keep = (uint8_t *)(uintptr_t)addresses[m->target];
    int64_t count = m->dims[0], begin = m->source_offset * m->itemsize;
    if (!from) return;
    from += begin;
    if (flag && m->take) {
        int found = m->itemsize == 1   ? any_set_1(from, count, (uint8_t)m->take)
                    : m->itemsize == 2 ? any_set_2((const half *)from, count, (half)m->take)
                    : m->itemsize == 4 ? any_set_4((const word *)from, count, (word)m->take)
                                       : any_set_8((const twice *)from, count, (twice)m->take);
        if (found) __atomic_store_n(flag, 1, __ATOMIC_RELAXED);
    }
    if (keep) copy(keep + begin, from, (size_t)(count * m->itemsize), stream);
}

/* ---- writing: one box of at most two dimensions, the others are walked by `box` ------------------------------ */

/* target[i] = source[i] (* factor[i]), side by side in both. */
static inline __attribute__((always_inline)) void row(
    single *t, const single *s, const single *f, int64_t f_step, int64_t count, int past) {
    int64_t i = 0;
    if (!f) {
        for (; i + 4 <= count; i += 4) store(t + i, load(s + i), past);
        for (; i < count; i++) ((word *)t)[i] = ((const word *)s)[i];
    } else if (f_step == 0) {
        floats by = {*f, *f, *f, *f};
        for (; i + 4 <= count; i += 4) store(t + i, load(s + i) * by, past);
        for (; i < count; i++) t[i] = s[i] * *f;
    } else {
        if (f_step == 1)
            for (; i + 4 <= count; i += 4) store(t + i, load(s + i) * load(f + i), past);
        for (; i < count; i++) t[i] = s[i] * f[i * f_step];
    }
}

/* Some rows of a move, one after the other: a call for each would cost more than a short one does. */
static inline __attribute__((always_inline)) void rows(
    const move *m, single *t, const single *s, const single *f, int64_t count, int past) {
    for (int64_t r = 0; r < m->dims[RANK - 2]; r++) {
        row(t, s, f, m->factor_strides[RANK - 1], count, past);
        t += m->target_strides[RANK - 2];
        s += m->source_strides[RANK - 2];
        if (f) f += m->factor_strides[RANK - 2];
    }
}

/* Four columns of four rows. */
static inline void turn(const single *s, int64_t step, floats *columns) {
    floats a = load(s), b = load(s + step), c = load(s + 2 * step), d = load(s + 3 * step);
    floats ab = SHUFFLE(a, b, 0, 4, 1, 5), ba = SHUFFLE(a, b, 2, 6, 3, 7);
    floats cd = SHUFFLE(c, d, 0, 4, 1, 5), dc = SHUFFLE(c, d, 2, 6, 3, 7);
    columns[0] = SHUFFLE(ab, cd, 0, 1, 4, 5);
    columns[1] = SHUFFLE(ab, cd, 2, 3, 6, 7);
    columns[2] = SHUFFLE(ba, dc, 0, 1, 4, 5);
    columns[3] = SHUFFLE(ba, dc, 2, 3, 6, 7);
}

/* `count` columns, 4, 8 or 16, known when this is compiled; `by` holds their factors. */
static inline __attribute__((always_inline)) void lanes(
    single *t, const single *s, const floats *by, const tile *k, int count, int past) {
    int64_t r = 0;
    for (; r + 4 <= k->run; r += 4) {
        floats out[LANES / 4][4];
        for (int q = 0; q < count / 4; q++) {
            turn(s + r + 4 * q * k->s_step, k->s_step, out[q]);
            if (by)
                for (int j = 0; j < 4; j++) out[q][j] *= by[q];
        }
        for (int j = 0; j < 4; j++) {
            single *to = t + place(k, r + j);
            for (int q = 0; q < count / 4; q++) store(to + 4 * q, out[q][j], past);
        }
    }
    for (; r < k->run; r++) {
        word *to = (word *)(t + place(k, r));
        const word *from = (const word *)(s + r);
        for (int w = 0; w < count; w++)
            if (by)
                ((single *)to)[w] = ((const single *)from)[w * k->s_step] * by[w / 4][w % 4];
            else
                to[w] = from[w * k->s_step];
    }
}

/* Also whether all bits of `exponent`, where it is not 0, are set in any element; `then` is read next. */
static int tiles(
    single *t, const single *s, const single *f, int64_t f_step, const tile *k, int64_t width, int past, word exponent,
    const single *then) {
    floats by[LANES / 4];
    int64_t w = 0;
    int found = 0;
    while (w < width) {
        int64_t left = width - w;
        int count = left >= LANES ? LANES : left >= 8 ? 8 : left >= 4 ? 4 : 1;
        single *to = t + w;
        const single *from = s + w * k->s_step;
        if (count == LANES && has_wide() && (!past || aligned(to, 64))) {
            const single *next = w + LANES < width ? from + LANES * k->s_step : then;
            found |= turn_lines(to, from, f ? f + w * f_step : NULL, f_step, k, past, exponent, next);
            w += count;
            continue;
        }
        if (exponent) /* first, which brings them into the cache */
            for (int j = 0; j < count; j++) found |= any_set_4((const word *)(from + j * k->s_step), k->run, exponent);
        if (f)
            for (int j = 0; j < count; j++) by[j / 4][j % 4] = f[(w + j) * f_step];
        if (count == LANES)
            lanes(to, from, f ? by : NULL, k, LANES, past);
        else if (count == 8)
            lanes(to, from, f ? by : NULL, k, 8, past);
        else if (count == 4)
            lanes(to, from, f ? by : NULL, k, 4, 0);
        else
            for (int64_t r = 0; r < k->run; r++)
                if (f)
                    to[place(k, r)] = from[r] * by[0][0];
                else
                    ((word *)to)[place(k, r)] = ((const word *)from)[r];
        w += count;
    }
    return found;
}

#define STRIDED(name, type)                                                                                    \
    static void name(type *t, const type *s, int64_t t_step, int64_t s_step, int64_t count) {                  \
        for (int64_t i = 0; i < count; i++) t[i * t_step] = s[i * s_step];                                     \
    }
STRIDED(strided_1, uint8_t)
STRIDED(strided_2, half)
STRIDED(strided_4, word)
STRIDED(strided_8, twice)

/* `then` is read next. */
static int innermost(
    const move *m, uint8_t *t, const uint8_t *s, const single *f, int looking, int stream, const uint8_t *then) {
    const int64_t *dims = m->dims, *ts = m->target_strides, *ss = m->source_strides, *fs = m->factor_strides;
    int64_t count = dims[RANK - 1], size = m->itemsize;
    int past = stream && m->lines && aligned(t, 32); /* part of a line would have to be read first */
    single *to = (single *)(void *)t;
    const single *from = (const single *)(const void *)s;
    int found = 0;
    if (m->kind == TILES) {
        tile k = {dims[RANK - 2], ts[RANK - 2], (const int64_t *)(uintptr_t)m->to, ss[RANK - 1]};
        word exponent = looking ? (word)m->take : 0;
        found = tiles(to, from, f, fs[RANK - 1], &k, count, past, exponent, (const single *)(const void *)then);
    } else if (m->kind == ROWS && size == 4 && (f || count < WIDE)) {
        if (count == LANES && !f)
            rows(m, to, from, NULL, LANES, past);
        else
            rows(m, to, from, f, count, past);
    } else if (m->kind == ROWS) {
        for (int64_t r = 0; r < dims[RANK - 2]; r++, t += ts[RANK - 2] * size, s += ss[RANK - 2] * size)
            if (looking)
                found |= copy_looking(t, s, (size_t)(count * size), size, m->take, stream, then);
            else
                copy(t, s, (size_t)(count * size), stream);
    } else if (f) {
        for (int64_t i = 0; i < count; i++) to[i * ts[RANK - 1]] = from[i * ss[RANK - 1]] * f[i * fs[RANK - 1]];
    } else {
        int64_t by = ts[RANK - 1], step = ss[RANK - 1];
        if (size == 1) strided_1(t, s, by, step, count);
        if (size == 2) strided_2((half *)t, (const half *)s, by, step, count);
        if (size == 4) strided_4((word *)t, (const word *)s, by, step, count);
        if (size == 8) strided_8((twice *)t, (const twice *)s, by, step, count);
    }
    return found;
}

/* `then` is read afterwards. */
static void box(const move *m, const uint64_t *addresses, int stream, const uint8_t *then) {
    uint8_t *t = (uint8_t *)(uintptr_t)addresses[m->target] + m->target_offset * m->itemsize;
    const uint8_t *s = (const uint8_t *)(uintptr_t)addresses[m->source] + m->source_offset * m->itemsize;
    const single *f = m->factor < 0 ? NULL : (const single *)(uintptr_t)addresses[m->factor] + m->factor_offset;
    uint8_t *flag = (uint8_t *)(uintptr_t)addresses[m->flag];
    int outer = m->kind == WALK ? RANK - 1 : RANK - 2, found = 0;
    int64_t index[RANK] = {0};
    for (;;) {
        uint8_t *to = t;
        const uint8_t *from = s;
        const single *by = f;
        int d = outer - 1;
        for (; d >= 0; d--) {
            t += m->target_strides[d] * m->itemsize;
            s += m->source_strides[d] * m->itemsize;
            if (f) f += m->factor_strides[d];
            if (++index[d] < m->dims[d]) break;
            t -= m->dims[d] * m->target_strides[d] * m->itemsize;
            s -= m->dims[d] * m->source_strides[d] * m->itemsize;
            if (f) f -= m->dims[d] * m->factor_strides[d];
            index[d] = 0;
        }
        found |= innermost(m, to, from, by, flag != NULL, stream, d < 0 ? then : s);
        if (d < 0) break;
    }
    if (found) __atomic_store_n(flag, 1, __ATOMIC_RELAXED);
}

static void gather(const move *m, const uint64_t *addresses) {
    uint8_t *t = (uint8_t *)(uintptr_t)addresses[m->target];
    const uint8_t *s = (const uint8_t *)(uintptr_t)addresses[m->source];
    const int64_t *to = (const int64_t *)(uintptr_t)m->to, *take = (const int64_t *)(uintptr_t)m->take;
    size_t size = (size_t)m->itemsize;
    for (int64_t i = 0; i < m->dims[0]; i++) memcpy(t + to[i] * (int64_t)size, s + take[i] * (int64_t)size, size);
}

/* ---- what Python calls --------------------------------------------------------------------------------------- */

int64_t onnx_refit_version(void) { return VERSION * 1000000 + (int64_t)sizeof(move) * 1000 + (int64_t)sizeof(batch); }

/* Begin a unit; -1 where there is none. It is to be finished whatever comes. */
static int64_t begin(batch *b) {
    if (__atomic_load_n(&b->next, __ATOMIC_RELAXED) >= b->count) return -1; /* asked often, `next` must not run over */
    int64_t unit = __atomic_fetch_add(&b->next, 1, __ATOMIC_RELAXED);
    return unit < b->count ? unit : -1;
}

/* Where a unit begins to read. */
static const uint8_t *first(const batch *b, int64_t unit) {
    const move *m = b->moves + b->units[unit + 1] - 1; /* those before it look at the same */
    const uint8_t *source = (const uint8_t *)(uintptr_t)b->addresses[m->source];
    return source ? source + m->source_offset * m->itemsize : NULL;
}

/* Do a unit; `after` is the one that this thread does next, or -1. */
static void finish(batch *b, int64_t unit, int64_t after) {
    const uint8_t *then = after < 0 ? NULL : first(b, after);
    for (int64_t i = b->units[unit]; i < b->units[unit + 1]; i++) {
        const move *m = b->moves + i;
        if (m->kind == LOOK)
            look(m, b->addresses, (int)b->stream);
        else if (m->kind == GATHER)
            gather(m, b->addresses);
        else
            box(m, b->addresses, (int)b->stream, then);
    }
#if defined(__SSE2__)
    _mm_sfence(); /* streamed stores are seen before whatever says that this is done */
#endif
    __atomic_fetch_add(&b->done, 1, __ATOMIC_RELEASE);
}

/* Do a unit that nobody has begun; 0 where there is none. */
static int one(batch *b) {
    int64_t unit = begin(b);
    if (unit >= 0) finish(b, unit, -1);
    return unit >= 0;
}

/* Until none is left to begin. */
void onnx_refit_work(batch *b) {
    for (int64_t unit = begin(b), after; unit >= 0; unit = after) finish(b, unit, after = begin(b));
}

/* The same for so many nanoseconds, sleeping so many times as long as it works: others need the cores more. */
void onnx_refit_pace(batch *b, int64_t times, int64_t most) {
    pace own = pace_begin(times);
    while (one(b) && own.begin - own.start < most) pace_rest(&own);
    pace_end(&own);
}

/* One unit, and as many more as are likely to end within so many nanoseconds; gives those that it took. */
int64_t onnx_refit_share(batch *b, int64_t most) {
    int64_t start = now(), took = 0, units = 0;
    while (one(b)) {
        took = now() - start;
        if (took + took / ++units > most) break;
    }
    return took;
}

/* Units that are not finished. */
int64_t onnx_refit_left(batch *b) { return b->count - __atomic_load_n(&b->done, __ATOMIC_ACQUIRE); }

/* Let nobody begin a unit from now on, and wait for those that were begun: a unit takes less than a millisecond. */
void onnx_refit_stop(batch *b) {
    int64_t begun = __atomic_exchange_n(&b->next, b->count, __ATOMIC_RELAXED);
    if (begun > b->count) begun = b->count;
    while (__atomic_load_n(&b->done, __ATOMIC_ACQUIRE) < begun) nanosleep(&(struct timespec){0, 20000}, NULL);
}

#include "helpers.h"
