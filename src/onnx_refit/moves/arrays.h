/* Looks at hundreds of NumPy's arrays at once, and reads a little of each: asked through the interpreter, each of them
 * costs more than the work on it.
 *
 * Included by moves.c. What is read of an array is the part of its structure that every compiled extension reads
 * (numpy/ndarraytypes.h, PyArrayObject_fields); roll.py calls none of this before it has seen that it is right.
 */
typedef struct {
    int64_t references;
    uint64_t type;
    uint64_t data;
    int32_t rank;
    const int64_t *dims;
    const int64_t *strides;
    uint64_t base;
    uint64_t dtype;
    int32_t flags;
} ndarray;

#define IN_ORDER 1 /* NPY_ARRAY_C_CONTIGUOUS */
#define AHEAD 12

/* What an array has to be. */
typedef struct {
    uint64_t dtype; /* the address of its dtype's object */
    int64_t rank;
    int64_t dims;   /* where its extents begin in the table of extents */
} form;

/* How many of these objects are arrays of their forms before the first that is not; and where their elements are, which
 * may be written over the objects' own addresses. */
int64_t onnx_refit_call(
    const uint64_t *objects, int64_t count, uint64_t type, const form *forms, const int64_t *extents,
    uint64_t *addresses) {
    for (int64_t i = 0; i < count; i++) {
        const ndarray *one = (const ndarray *)(uintptr_t)objects[i];
        if (i + AHEAD < count) {
            __builtin_prefetch((const char *)(uintptr_t)objects[i + AHEAD]);
            __builtin_prefetch((const char *)(uintptr_t)objects[i + AHEAD] + 64);
        }
        if (one->type != type || one->dtype != forms[i].dtype || one->rank != forms[i].rank) return i;
        if (!(one->flags & IN_ORDER)) return i;
        for (int64_t d = 0; d < one->rank; d++)
            if (one->dims[d] != extents[forms[i].dims + d]) return i;
        addresses[i] = one->data;
    }
    return count;
}

/* The elements of some arrays of float32 one behind the other; whether one is not finite. */
int64_t onnx_refit_join(
    const uint64_t *addresses, const int64_t *places, const int64_t *bytes, int64_t count, uint8_t *to) {
    const uint8_t *begin = to;
    for (int64_t k = 0; k < count; k++) {
        if (k + AHEAD < count)
            for (int64_t line = 0; line < bytes[k + AHEAD] && line < 512; line += 64)
                __builtin_prefetch((const char *)(uintptr_t)addresses[places[k + AHEAD]] + line);
        memcpy(to, (const void *)(uintptr_t)addresses[places[k]], (size_t)bytes[k]);
        to += bytes[k];
    }
    return any_set_4((const word *)begin, (to - begin) / 4, 0x7f800000);
}

/* A few elements of some arrays one behind the other. `positions` are in bytes, so many of each array. */
void onnx_refit_sample(
    const uint64_t *addresses, const int64_t *places, const int64_t *sizes, const int64_t *positions,
    const int64_t *ends, int64_t count, uint8_t *to) {
    int64_t p = 0;
    for (int64_t k = 0; k < count; k++) {
        const char *from = (const char *)(uintptr_t)addresses[places[k]];
        if (k + 1 < count)
            for (int64_t q = ends[k]; q < ends[k + 1]; q++)
                __builtin_prefetch((const char *)(uintptr_t)addresses[places[k + 1]] + positions[q]);
        for (; p < ends[k]; p++, to += sizes[k]) memcpy(to, from + positions[p], (size_t)sizes[k]);
    }
}

/* What a refit of everything asks of its arrays, all of it; the fields are tables as above. */
typedef struct {
    int64_t count;
    uint64_t type;
    const form *forms;
    const int64_t *extents;
    const int64_t *joined, *bytes;
    int64_t joins;
    const int64_t *places, *sizes, *positions, *ends;
    int64_t samples;
} sight;

enum { OTHERS = 1, NOT_FINITE = 2, ALIKE = 4 };

/* Whether the objects at these addresses are OTHERS than the arrays that they should be (then nothing else was done);
 * whether one of those joined at `to` is NOT_FINITE; whether all samples taken of one are as they were before: ALIKE.
 * Where the arrays' elements are is written over their own addresses. */
int64_t onnx_refit_see(
    const sight *s, uint64_t *addresses, uint8_t *to, uint8_t *taken, const uint8_t *before) {
    if (onnx_refit_call(addresses, s->count, s->type, s->forms, s->extents, addresses) < s->count) return OTHERS;
    onnx_refit_sample(addresses, s->places, s->sizes, s->positions, s->ends, s->samples, taken);
    int64_t found = onnx_refit_join(addresses, s->joined, s->bytes, s->joins, to) ? NOT_FINITE : 0;
    for (int64_t k = 0, begin = 0; k < s->samples; k++) {
        size_t bytes = (size_t)((s->ends[k] - begin) * s->sizes[k]);
        begin = s->ends[k];
        if (!memcmp(taken, before, bytes)) found |= ALIKE;
        taken += bytes;
        before += bytes;
    }
    return found;
}
