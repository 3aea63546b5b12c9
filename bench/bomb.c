/* Forks without end, and so does each child: see bench/bombs.py, which bounds it. */
#include <unistd.h>

int main(void)
{
	for (;;)
		fork();
}
