/* What bench/oom.py needs that must not wait for an interpreter: who runs out of memory, and who acts as soon as can be.
 *
 * hog FILE BYTES: waits for a byte on stdin, then touches so much memory, page by page. FILE holds two times of
 * CLOCK_MONOTONIC, ns: its own, written before each page, and that of a bystander, its child, each 50 us.
 *
 * floor: the least that a keeper of jobs can do, on cgroup v1. On stdin the directory of a memory cgroup and that of a
 * freezer; it makes the tasks there wait for it and says "r". When their memory runs out it freezes them, sends SIGKILL
 * to all of them, thaws them, and says when it woke up, had frozen and had killed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, ROOM = 8192, BYSTANDER_NS = 50000 };

struct stamps {
    volatile uint64_t hog, bystander;
};

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000ULL + at.tv_nsec;
}

static void bystander(struct stamps *stamps)
{
    struct timespec pause = {0, BYSTANDER_NS};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        stamps->bystander = now();
        nanosleep(&pause, NULL);
    }
}

static int hog(const char *path, size_t bytes)
{
    char byte;
    int file = open(path, O_RDWR | O_CLOEXEC);
    struct stamps *stamps = mmap(NULL, sizeof *stamps, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (stamps == MAP_FAILED)
        fail(path);
    stamps->hog = stamps->bystander = 0; /* written here, before it is in the job: the page is not the job's */
    if (read(0, &byte, 1) != 1)
        return 0;
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child == 0)
        bystander(stamps);
    while (stamps->bystander == 0)
        usleep(50);
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    for (size_t at = 0; at < bytes; at += PAGE) {
        stamps->hog = now();
        memory[at] = 1;
    }
    return 0; /* the limit was never reached */
}

static int opened(const char *directory, const char *name, int flags)
{
    char path[ROOM];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0)
        fail(path);
    return fd;
}

static void put(int fd, const char *text)
{
    if (write(fd, text, strlen(text)) < 0)
        fail(text);
}

static void act(const char *memory, const char *freezer)
{
    static char text[1 << 16];
    uint64_t said;
    int event = eventfd(0, EFD_CLOEXEC), control = opened(memory, "memory.oom_control", O_RDWR);
    int told = opened(memory, "cgroup.event_control", O_WRONLY), state = opened(freezer, "freezer.state", O_WRONLY);
    int pids = opened(freezer, "cgroup.procs", O_RDONLY);
    put(control, "1");
    snprintf(text, sizeof text, "%d %d", event, control);
    put(told, text);
    puts("r");
    fflush(stdout);
    do {
        if (read(event, &said, sizeof said) != sizeof said)
            fail("eventfd");
        text[pread(control, text, sizeof text - 1, 0)] = 0;
    } while (!strstr(text, "under_oom 1"));
    uint64_t heard = now();
    put(state, "FROZEN");
    uint64_t frozen = now();
    ssize_t size = read(pids, text, sizeof text - 1);
    if (size <= 0)
        fail("cgroup.procs");
    text[size] = 0;
    for (char *at = text; *at; at = strchr(at, '\n') + 1)
        kill(atoi(at), SIGKILL);
    put(state, "THAWED");
    printf("%llu %llu %llu\n", (unsigned long long)heard, (unsigned long long)frozen, (unsigned long long)now());
    fflush(stdout);
    close(event), close(control), close(told), close(state), close(pids);
}

int main(int argc, char **argv)
{
    static char memory[4096], freezer[4096];
    if (argc == 4 && strcmp(argv[1], "hog") == 0)
        return hog(argv[2], strtoull(argv[3], NULL, 10));
    if (argc != 2 || strcmp(argv[1], "floor") != 0)
        return 64;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (fgets(memory, sizeof memory, stdin) && fgets(freezer, sizeof freezer, stdin)) {
        memory[strcspn(memory, "\n")] = freezer[strcspn(freezer, "\n")] = 0;
        act(memory, freezer);
    }
    return 0;
}
