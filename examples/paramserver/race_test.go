//go:build race

package main

// raceEnabled: the detector makes the arithmetic some thirty times slower.
const raceEnabled = true
