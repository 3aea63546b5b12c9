/* The floor of bench/scrape.py: the same lines, written from ready labels and ready integers.
 *
 * argv[1] names a file with one line a series: name and labels, a tab, the integer, a blank, by how much it is divided.
 * argv[2] is how often all lines are written into memory; each time's CPU time in ns goes to stdout, one line each, and
 * at last how many bytes they were.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct line {
    char *series;
    unsigned long long value;
    double per;
};

static struct line *lines;
static size_t count, room;

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
    FILE *in = argc == 3 ? fopen(argv[1], "r") : NULL;
    char *text = NULL;
    size_t size = 0, bytes = 0;
    if (!in)
        return 1;
    while (getline(&text, &size, in) > 0) {
        char *tab = strchr(text, '\t');
        if (!tab)
            return 1;
        if (count == room)
            lines = realloc(lines, (room = room * 2 + 1024) * sizeof *lines);
        *tab = '\0';
        lines[count].series = strdup(text);
        if (sscanf(tab + 1, "%llu %lf", &lines[count].value, &lines[count].per) != 2)
            return 1;
        bytes += strlen(text) + 32;
        count++;
    }
    char *out = malloc(bytes);
    for (int round = atoi(argv[2]); round > 0; round--) {
        long long before = now();
        char *at = out;
        for (size_t i = 0; i < count; i++) {
            at = stpcpy(at, lines[i].series);
            if (lines[i].per == 1.0)
                at += sprintf(at, " %llu\n", lines[i].value);
            else
                at += sprintf(at, " %.17g\n", (double)lines[i].value / lines[i].per);
        }
        printf("%lld\n", now() - before);
        bytes = at - out;
    }
    printf("%zu\n", bytes);
    return 0;
}
