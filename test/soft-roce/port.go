//go:build linux

package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// A port is the machine's end of the virtio-serial port: a stream to the host and back.
type port struct {
	f         *os.File
	connected bool // the host has been heard
}

// openPort waits until the port appears. Two processes cannot have it open at once.
func openPort() (*port, error) {
	for range 500 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name") // the pattern is well formed
		for _, n := range names {
			text, err := os.ReadFile(n)
			if err != nil || strings.TrimSpace(string(text)) != guestPort {
				continue
			}
			f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			if err != nil {
				return nil, fmt.Errorf("open the port to the host: %w", err)
			}
			return &port{f: f}, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("no virtio-serial port named %s", guestPort)
}

// Read reads what the host sends. Until the kernel has learnt that the host is connected it reports the end of the file,
// which means something only later.
func (p *port) Read(b []byte) (int, error) {
	for wait := 0; ; wait++ {
		n, err := p.f.Read(b)
		if err != io.EOF || p.connected || wait == 1000 {
			p.connected = true
			return n, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (p *port) Write(b []byte) (int, error) { return p.f.Write(b) }

func (p *port) Close() error { return p.f.Close() }
