/* One process in each job, asleep until told to work: what stands in for the jobs in bench/poll.py.
 *
 * argv[1] is a directory for files to write to. stdin: the paths of a job's cgroup.procs files, one a line, an empty line
 * after each job, and "." after the last. A byte out says that all have joined. Each byte in then lets every job touch
 * memory, use CPU time and write a block past the page cache, and a byte out says that all have done so.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MEMORY = 1 << 20, BURN_NS = 100000, JOBS = 8192, HIERARCHIES = 16 };

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void join(const char *procs)
{
    int fd = open(procs, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, "0", 1) != 1)
        fail(procs);
    close(fd);
}

static long long cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Every other time the memory is taken, and given back in between: anonymous memory moves with each turn. */
static void work(int turn, int file)
{
    static char *memory;
    static char block[PAGE] __attribute__((aligned(PAGE)));
    long long until = cpu_ns() + BURN_NS;
    if (turn % 2) {
        memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            fail("mmap");
        for (int at = 0; at < MEMORY; at += PAGE)
            memory[at] = 1;
    } else {
        munmap(memory, MEMORY);
    }
    if (file >= 0 && pwrite(file, block, sizeof block, 0) != sizeof block)
        fail("pwrite");
    while (cpu_ns() < until)
        ;
}

static void job(const char *directory, int number, int go, int done)
{
    char path[4096], byte;
    snprintf(path, sizeof path, "%s/%d", directory, number);
    /* Where the file system knows no O_DIRECT, block I/O stays as it is. */
    int file = open(path, O_WRONLY | O_CREAT | O_DIRECT | O_CLOEXEC, 0600);
    if (write(done, "j", 1) != 1)
        fail("write");
    for (int turn = 1; read(go, &byte, 1) == 1; turn++) {
        work(turn, file);
        if (write(done, "d", 1) != 1)
            fail("write");
    }
    exit(0);
}

static void all(int done, int jobs)
{
    char byte;
    while (jobs--)
        if (read(done, &byte, 1) != 1)
            fail("read");
    if (write(1, "r", 1) != 1)
        fail("write");
}

int main(int argc, char **argv)
{
    static int go[JOBS];
    static char procs[HIERARCHIES][4096];
    char byte;
    int jobs = 0, hierarchies, done[2], start[2];
    if (argc != 2)
        return 64;
    if (pipe(done))
        fail("pipe");
    for (;; jobs++) {
        for (hierarchies = 0; hierarchies < HIERARCHIES; hierarchies++) {
            char *line = procs[hierarchies];
            if (!fgets(line, sizeof procs[0], stdin))
                fail("stdin");
            line[strcspn(line, "\n")] = 0;
            if (*line == 0 || *line == '.')
                break;
        }
        if (hierarchies == 0 || jobs == JOBS)
            break;
        if (pipe(start))
            fail("pipe");
        go[jobs] = start[1];
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (int i = 0; i <= jobs; i++)
                close(go[i]);
            for (int i = 0; i < hierarchies; i++)
                join(procs[i]);
            job(argv[1], jobs, start[0], done[1]);
        }
        close(start[0]);
    }
    all(done[0], jobs);
    while (read(0, &byte, 1) == 1) {
        for (int i = 0; i < jobs; i++)
            if (write(go[i], "g", 1) != 1)
                fail("write");
        all(done[0], jobs);
    }
    return 0;
}
