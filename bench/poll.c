/* The peer of bench/poll.py: reads the very same counter files, kept open, and takes the very same numbers out of them.
 *
 * argv[1] names a list with one file a line: kind, path, names, separated by blanks. Kinds: n one number; s "name value"
 * lines, those named; d "device name value" lines, those named; k "device name=value ..." lines, those named;
 * p pressure lines, those named. One byte on stdin is one tick; its CPU time in ns goes to stdout, one line a tick.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { NAMES = 8, ROOM = 16384 };

struct counter {
    int fd;
    char kind;
    int names;
    char *name[NAMES];
    size_t length[NAMES];
    unsigned long long value[NAMES];
};

static struct counter *counters;
static size_t count;
static unsigned long long sum; /* keeps the compiler from leaving the parsing out */

static int wanted(const struct counter *c, const char *word, size_t length)
{
    for (int i = 0; i < c->names; i++)
        if (c->length[i] == length && memcmp(c->name[i], word, length) == 0)
            return i;
    return -1;
}

static void parse(struct counter *c, const char *at)
{
    if (c->kind == 'n') {
        c->value[0] = strtoull(at, NULL, 10);
        return;
    }
    while (*at) {
        const char *end = strchrnul(at, '\n');
        const char *word = at;
        if (c->kind == 'k' || c->kind == 'd') {
            word = memchr(at, ' ', end - at);
            word = word ? word + 1 : end;
        }
        while (word < end) {
            const char *stop = word + strcspn(word, c->kind == 'k' ? "= \n" : " \n");
            int i = wanted(c, word, stop - word);
            if (i >= 0) {
                const char *value = stop + 1;
                if (c->kind == 'p')
                    value = strstr(stop, " total=") + 7;
                c->value[i] = strtoull(value, NULL, 10);
            }
            if (c->kind != 'k')
                break;
            word = stop + strcspn(stop, " \n");
            word += *word == ' ';
        }
        at = *end ? end + 1 : end;
    }
}

static void tick(void)
{
    static char text[ROOM];
    for (size_t i = 0; i < count; i++) {
        ssize_t size = pread(counters[i].fd, text, sizeof text - 1, 0);
        if (size < 0) {
            perror("pread");
            exit(1);
        }
        text[size] = 0;
        parse(&counters[i], text);
        sum += counters[i].value[0];
    }
}

static void load(const char *list)
{
    char line[4096];
    FILE *stream = fopen(list, "r");
    if (!stream) {
        perror(list);
        exit(1);
    }
    while (fgets(line, sizeof line, stream)) {
        char *rest = line;
        counters = reallocarray(counters, count + 1, sizeof *counters);
        struct counter *c = memset(&counters[count++], 0, sizeof *c);
        c->kind = *strtok_r(rest, " \n", &rest);
        char *path = strtok_r(NULL, " \n", &rest);
        c->fd = open(path, O_RDONLY | O_CLOEXEC);
        if (c->fd < 0) {
            perror(path);
            exit(1);
        }
        for (char *name; c->names < NAMES && (name = strtok_r(NULL, " \n", &rest));) {
            c->length[c->names] = strlen(name);
            c->name[c->names++] = strdup(name);
        }
    }
    fclose(stream);
}

static long long cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int main(int argc, char **argv)
{
    char byte;
    if (argc != 2)
        return 64;
    load(argv[1]);
    while (read(0, &byte, 1) == 1) {
        long long before = cpu_ns();
        tick();
        printf("%lld\n", cpu_ns() - before);
        fflush(stdout);
    }
    fprintf(stderr, sum == 42 ? " " : "");
    return 0;
}
