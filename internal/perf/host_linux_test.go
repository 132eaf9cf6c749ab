package perf

import (
	"bufio"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseCPUInfo(t *testing.T) {
	for in, want := range map[string]string{
		"processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Some CPU @ 2 GHz\n":                     "Some CPU @ 2 GHz",
		"processor\t: 0\nBogoMIPS\t: 50\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\nCPU part\t: 0xd0d\n": "implementer 0x41 part 0xd0c",
		"": "unknown",
	} {
		if got := parseCPUInfo(bufio.NewScanner(strings.NewReader(in))); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// TestPinRestores: what is pinned for a measurement is free afterwards.
func TestPinRestores(t *testing.T) {
	before, err := allowedCPUs()
	if err != nil {
		t.Fatal(err)
	}
	cpu := anyCPU()
	one := unix.CPUSet{}
	one.Set(cpu)
	check := func(when string, want unix.CPUSet) {
		t.Helper()
		if now, err := allowedCPUs(); err != nil || now != want {
			t.Errorf("%s: %v, %v", when, now.Count(), err)
		}
	}
	err = pinned(cpu, func() error {
		check("pinned", one)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	check("after pinned", before)
	restore, err := pinProcess(cpu)
	if err != nil {
		t.Fatal(err)
	}
	check("process pinned", one)
	restore()
	check("after the process was pinned", before)
	if err := pinned(4000, func() error { t.Error("it ran"); return nil }); err == nil || !strings.Contains(err.Error(), "processor 4000") {
		t.Errorf("no such processor: %v", err)
	}
	if _, err := pinProcess(4000); err == nil || !strings.Contains(err.Error(), "processor 4000") {
		t.Errorf("no such processor: %v", err)
	}
	check("after failures", before)
}

// TestSpawnOfOthers starts programs that are no servers.
func TestSpawnOfOthers(t *testing.T) {
	spawn := func(ctx context.Context, path string, args ...string) error {
		c, err := Spawn(ctx, path, args, io.Discard)
		if err == nil {
			c.Close()
		}
		return err
	}
	if err := spawn(t.Context(), "/nonexistent/program"); err == nil || !strings.Contains(err.Error(), "starting a server") {
		t.Errorf("no program: %v", err)
	}
	if err := spawn(t.Context(), "/bin/sh", "-c", "exit 3"); err == nil || !strings.Contains(err.Error(), "before it listened") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("ends at once: %v", err)
	}
	if err := spawn(t.Context(), "/bin/sh", "-c", "echo hello; read x"); err == nil || !strings.Contains(err.Error(), `"hello\n"`) {
		t.Errorf("says something else: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := spawn(ctx, "/bin/sh", "-c", "read x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("says nothing: %v", err)
	}
	c, err := Spawn(t.Context(), "/bin/sh", []string{"-c", "echo listening on 127.0.0.1:7 on something; read x; exit 0"}, io.Discard)
	if err != nil || c.Addr != "127.0.0.1:7" {
		t.Fatalf("%+v, %v", c, err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("Close again: %v", err)
	}
}
