//go:build race

package softnic

const raceEnabled = true
