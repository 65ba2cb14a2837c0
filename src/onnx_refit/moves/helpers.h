/* Threads that wait here, without the interpreter's lock, for batches to help with.
 *
 * Included by moves.c. Whoever has a batch calls them and works too; they wait on a futex, and for a while by turning,
 * so that a call just before the batch is there has them awake when it comes. Linux only: `onnx_refit_helped` is 0
 * elsewhere, and nobody waits.
 */
typedef struct {
    int64_t call;   /* counts calls; its lower half is the futex */
    int64_t batch;  /* address of the batch to help with, or 0 */
    int64_t inside; /* helpers that may know a batch */
    int64_t closed;
} helpers;

#if defined(__linux__) && (!defined(__BYTE_ORDER__) || __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TURNING 400000 /* ns to wait for a batch after a call */

static inline void rest_a_little(void) {
#if defined(__x86_64__)
    for (int i = 0; i < 20; i++) __builtin_ia32_pause();
#endif
}

int64_t onnx_refit_helped(void) { return 1; }

/* Have the helpers look for a batch. */
void onnx_refit_rouse(helpers *h) {
    __atomic_fetch_add(&h->call, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &h->call, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
}

/* A helper: returns once they are dismissed. */
void onnx_refit_help(helpers *h) {
    uint32_t seen = 0;
    while (!__atomic_load_n(&h->closed, __ATOMIC_ACQUIRE)) {
        uint32_t call = (uint32_t)__atomic_load_n(&h->call, __ATOMIC_ACQUIRE);
        if (call == seen) {
            syscall(SYS_futex, &h->call, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            continue;
        }
        seen = call;
        int64_t start = now();
        do {
            /* First be counted, then look: who takes the batch away first takes it away, then counts. */
            __atomic_fetch_add(&h->inside, 1, __ATOMIC_SEQ_CST);
            batch *b = (batch *)(uintptr_t)__atomic_load_n(&h->batch, __ATOMIC_SEQ_CST);
            if (b) onnx_refit_work(b);
            __atomic_fetch_sub(&h->inside, 1, __ATOMIC_RELEASE);
            if (b) break;
            rest_a_little();
        } while (now() - start < TURNING && !__atomic_load_n(&h->closed, __ATOMIC_ACQUIRE));
    }
}

/* Do a batch together; nobody works on it any more when this returns. One batch at a time. */
void onnx_refit_together(helpers *h, batch *b) {
    __atomic_store_n(&h->batch, (int64_t)(uintptr_t)b, __ATOMIC_SEQ_CST);
    onnx_refit_rouse(h);
    onnx_refit_work(b);
    __atomic_store_n(&h->batch, 0, __ATOMIC_SEQ_CST);
    for (int64_t start = now(); __atomic_load_n(&h->inside, __ATOMIC_SEQ_CST);)
        if (now() - start < TURNING)
            rest_a_little();
        else
            nanosleep(&(struct timespec){0, 20000}, NULL); /* one of them was put aside by the system */
}

/* Let the helpers go. */
void onnx_refit_dismiss(helpers *h) {
    __atomic_store_n(&h->closed, 1, __ATOMIC_SEQ_CST);
    onnx_refit_rouse(h);
}
#else
int64_t onnx_refit_helped(void) { return 0; }
void onnx_refit_rouse(helpers *h) { (void)h; }
void onnx_refit_help(helpers *h) { (void)h; }
void onnx_refit_together(helpers *h, batch *b) { (void)h, onnx_refit_work(b); }
void onnx_refit_dismiss(helpers *h) { (void)h; }
#endif
