// Package repotest holds the tests of the repository as a whole: which package may import which, where unsafe may
// stand, what must have a doc comment, and that the README says what is true. They read the source of all packages,
// for every system, without building it.
package repotest
