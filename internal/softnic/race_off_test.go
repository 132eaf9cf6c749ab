//go:build !race

package softnic

const raceEnabled = false
