/* How a thread that moves weights leaves the cores to requests, where these need them all.
 *
 * Included by moves.c. After each unit the thread sleeps some times as long as the unit took. Its sleeps end when they
 * should (Linux otherwise lets them run 50 us over), and when they end it waits for a core that is idle, or for the
 * scheduler's next tick, instead of taking one from a request (SCHED_BATCH); unless it is late by then, for with every
 * core at work ticks come seldom. Both belong to the calling thread and are as before when the work is done. A thread
 * whose policy is not the usual one keeps it; where the system refuses, or is not Linux, the sleeps are all.
 */
#if defined(__linux__)
#include <sched.h>
#include <sys/prctl.h>
#endif

#define LONGEST 2000000 /* ns of a unit that count: it may itself have been put aside */
#define LATE 20         /* times what it has worked; from then on it takes a core when its sleep is over */

typedef struct {
    int64_t times; /* what it works, to sleep; 0: go on at once */
    int64_t start, begin, worked;
    int batch, policy;
    unsigned long slack;
} pace;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Whether to wait for an idle core or a tick from now on. */
static void yielding(pace *p, int batch) {
#if defined(__linux__)
    if (p->policy == SCHED_OTHER && batch != p->batch)
        if (!sched_setscheduler(0, batch ? SCHED_BATCH : SCHED_OTHER, &(struct sched_param){0})) p->batch = batch;
#else
    (void)p, (void)batch;
#endif
}

static pace pace_begin(int64_t times) {
    pace p = {times, 0, 0, 0, 0, -1, 0};
    if (!times) return p;
#if defined(__linux__)
    int slack = prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0);
    p.slack = slack > 0 ? (unsigned long)slack : 0; /* 0 sets the thread's default */
    prctl(PR_SET_TIMERSLACK, 1UL, 0, 0, 0);
    p.policy = sched_getscheduler(0);
    yielding(&p, 1);
#endif
    p.start = p.begin = now();
    return p;
}

/* After a unit. */
static void pace_rest(pace *p) {
    if (!p->times) return;
    int64_t time = now(), took = time - p->begin;
    if (took > LONGEST) took = LONGEST;
    p->worked += took;
    yielding(p, time - p->start < LATE * p->worked);
    took *= p->times;
    nanosleep(&(struct timespec){took / 1000000000, took % 1000000000}, NULL);
    p->begin = now();
}

static void pace_end(pace *p) {
    if (!p->times) return;
    yielding(p, 0);
#if defined(__linux__)
    prctl(PR_SET_TIMERSLACK, p->slack, 0, 0, 0);
#endif
}
