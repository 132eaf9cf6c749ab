//go:build race

package ring

// Race says that the race detector is on. It does not see what orders memory between processes, so code that relies on that
// order tells it by an atomic operation that is otherwise unneeded.
const Race = true
