// Package unixmsg is what software NICs, and those who observe them, do with Unix sockets besides package net.
package unixmsg
