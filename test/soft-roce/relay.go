//go:build linux

package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// A relay lets clients share the machine: each client's connection carries one command, whose frames get a number of their
// own on the way to the machine. A client that does not read its output holds up the others; one that is gone does not.
type relay struct {
	machine *machine
	to      *frameWriter

	mu      sync.Mutex
	next    uint32
	clients map[uint32]*frameWriter
	dead    *exitStatus // what clients get once the machine has gone
}

func newRelay(m *machine) *relay {
	return &relay{machine: m, to: &frameWriter{w: m.conn}, clients: map[uint32]*frameWriter{}}
}

// serve accepts clients until the listener is closed.
func (r *relay) serve(l *listener) {
	go r.answers()
	for {
		conn, err := l.accept()
		if err != nil {
			return
		}
		go r.client(conn)
	}
}

// answers hands what the machine sends to the clients.
func (r *relay) answers() {
	for {
		f, err := readFrame(r.machine.in)
		if err != nil {
			r.end(err)
			return
		}
		r.mu.Lock()
		c := r.clients[f.id]
		if f.kind == kindStatus {
			delete(r.clients, f.id)
		}
		r.mu.Unlock()
		if c != nil {
			_ = c.send(f.kind, 0, f.payload) // a client that has gone is noticed by its reader
		}
	}
}

// end tells all clients, and all that come, that the machine is gone.
func (r *relay) end(err error) {
	select {
	case <-r.machine.exited: // who waits for a command can now say how it ended
	case <-time.After(5 * time.Second):
	}
	s := &exitStatus{failure, fmt.Sprintf("the connection to the machine is gone: %v", err)}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dead = s
	for _, c := range r.clients {
		_ = c.send(kindStatus, 0, s.encode())
	}
	clear(r.clients)
}

// client serves one connection.
func (r *relay) client(conn *os.File) {
	defer conn.Close()
	c := &frameWriter{w: conn}
	r.mu.Lock()
	r.next++
	id := r.next
	dead := r.dead
	if dead == nil {
		r.clients[id] = c
	}
	r.mu.Unlock()
	if dead != nil {
		_ = c.send(kindStatus, 0, dead.encode())
		return
	}
	in := bufio.NewReaderSize(conn, 64<<10)
	for {
		f, err := readFrame(in)
		if err != nil {
			break
		}
		if r.to.send(f.kind, id, f.payload) != nil {
			break
		}
	}
	r.mu.Lock()
	running := r.clients[id] != nil
	delete(r.clients, id)
	r.mu.Unlock()
	if running {
		_ = r.to.send(kindKill, id, nil)
	}
}

const powerOffTimeout = time.Minute

// powerOff has the machine write what it holds for the host and turn itself off, and waits until it is gone.
func (r *relay) powerOff() error {
	if err := r.to.send(kindPowerOff, 0, nil); err != nil {
		return errors.Join(errors.New("the machine cannot be turned off"), err)
	}
	select {
	case <-r.machine.exited:
		return nil
	case <-time.After(powerOffTimeout):
		return fmt.Errorf("the machine did not turn itself off within %v: what it wrote to /out may be incomplete%s", powerOffTimeout, r.machine.console.tail())
	}
}
